"""The stored keys and values of one layer."""

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.ops.merge_attention import merge_attention
from turboquant_core.quantized import storage_nbytes
from turboquant_hf.storage.full_precision import FullPrecision
from turboquant_hf.storage.length import Length, Missing
from turboquant_hf.storage.pages import Pages
from turboquant_hf.storage.tables import MAX_STEP_TOKENS
from turboquant_hf.storage.tables import seen as seen_by


class Store:
    """Keys and values [batch_size, num_kv_heads, num_tokens, head_dim] of one layer.

    All tokens are codes in pages. The first and the newest of a row may be stored beside these as they are, and are
    read so.

    Args:
        pages: The codes.
        length: How many tokens there are.
        full_precision: The first tokens and the newest; None to store codes only.
    """

    def __init__(self, pages: Pages, length: Length, full_precision: FullPrecision | None = None) -> None:
        self.pages = pages
        self.length = length
        self.full_precision = full_precision

    @property
    def config(self) -> TurboQuantConfig:
        """What is stored for one head."""
        return self.pages.config

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.pages.batch_size

    @property
    def num_kv_heads(self) -> int:
        """Heads of a row."""
        return self.pages.num_kv_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of a row."""
        return self.length.num_tokens

    @property
    def used_nbytes(self) -> int:
        """Bytes of the codes and scales of stored tokens."""
        return self.length.num_tokens * self.batch_size * self.num_kv_heads * self.config.slot_bytes

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything that is stored."""
        return storage_nbytes(self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        parts = (self.pages, self.length, self.full_precision)
        return [tensor for part in parts if part is not None for tensor in part.tensors()]

    def append(self, keys: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor | None = None) -> None:
        """Store keys and values [batch_size, num_kv_heads, num_new, head_dim].

        Args:
            keys: New keys.
            values: New values.
            row_starts: With the first tokens of all, which of them is the first of every row that is no padding, int32
                [batch_size]; None where no row is padded.

        Raises:
            IndexError: If these are the first tokens of all, and more than there is room for.
        """
        keys, values, num_new = keys.detach(), values.detach(), keys.shape[2]
        written, missing = self.length.begin(num_new, row_starts, keys.device)
        if num_new == 0:
            return
        if self.full_precision is not None:
            self._fill(missing)
            self.full_precision.write(keys, values, written)
        self.pages.write(keys, values, written, self.length, row_starts)
        self.length.advance()

    def extend(self, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and dequantise what attention of the new tokens reads; see `dequantize`.

        With recent tokens the new ones read each other, and those before the first of them, as they are.
        """
        num_new = keys.shape[2]
        if not self.length.sizes.recent or num_new <= MAX_STEP_TOKENS:
            self.append(keys, values)
            return self.dequantize(dtype)
        # They are written over the recent tokens that the first of them reads.
        self._fill(self.length.missing())
        read = self._read(dtype, num_new=0, room=num_new)
        at = torch.arange(num_new, device=keys.device) + (self.length.stop - self._first_read(0))
        at = at.clamp(max=read[0].shape[2] - 1)
        self.append(keys, values)
        for states, new in zip(read, (keys, values), strict=True):
            states.index_copy_(2, at, new.detach())
        return self._marked(*read)

    @property
    def parts_calls(self) -> bool:
        """Whether the tokens of a call see different ones as they are; see `dequantize_parts`."""
        return self.length.is_counted and self.length.sizes.recent > 0

    def append_parts(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Append, and give what may leave full precision thereby: the recent tokens before the new ones, and these.

        Returns:
            Keys and values of the last positions, as they are; None where full precision has them all.
        """
        if not self.parts_calls or keys.shape[2] <= MAX_STEP_TOKENS:
            self.append(keys, values)
            return None
        self._fill(self.length.missing())
        before = self._recent(0)
        self.append(keys, values)
        recent_keys, recent_values = (
            torch.cat([held, new.detach()], dim=2) for held, new in zip(before, (keys, values), strict=True)
        )
        return recent_keys, recent_values

    def dequantize_parts(
        self, dtype: torch.dtype, recent: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the tokens of a call read where each sees the newest as they are, and those before as codes.

        Args:
            dtype: Type of the result.
            recent: What `append_parts` gave.

        Returns:
            Keys and values [batch_size, num_kv_heads, num_read + num_recent, head_dim]: what codes and the first tokens
            say, and then the last num_recent tokens as they are; and which of the two a token reads, bool [1 or
            batch_size, num_new, num_read + num_recent]: of every token one, of those after it what they are.
        """
        sizes, num_new = self.length.sizes, self.length.num_new
        recent = self._recent(num_new) if recent is None else recent
        num_recent = recent[0].shape[2]
        stored = self._read(dtype, num_new=None)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(stored, recent, strict=True))
        position = torch.arange(self._first_read(None), self.length.num_seen, device=keys.device)
        num_read = len(position)
        query, last = position[num_read - num_new :, None], position[num_read - num_recent :]
        row_starts = self.length.row_starts
        first_end = sizes.first if row_starts is None else (row_starts + sizes.first)[:, None, None]
        near = (last > query - sizes.recent) & (last >= first_end)
        # Not view(-1, ...): where there is none that size is not known.
        near = near if near.ndim == 3 else near[None]
        far = near.new_ones(len(near), num_new, num_read - num_recent)
        return keys, values, torch.cat([far, ~near, near], dim=-1)

    def dequantize(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that attention of the last call reads, [batch_size, num_kv_heads, num_read, head_dim].

        Those past the last token of a static store are arbitrary, and all keys NaN where tokens did not fit.

        Raises:
            RuntimeError: If nothing is stored.
        """
        return self._marked(*self._read(dtype, num_new=self.length.num_new))

    def stored(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a next call would read, [batch_size, num_kv_heads, num_tokens, head_dim]."""
        num_tokens = self.length.num_tokens
        keys, values = self._marked(*self._read(dtype, num_new=0))
        return keys[:, :, :num_tokens], values[:, :, :num_tokens]

    def attend(
        self,
        query: torch.Tensor,
        seq_starts: torch.Tensor | None = None,
        window: int | None = None,
        *,
        scale: float | None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the last stored tokens on the codes, and on full precision.

        Args:
            query: [batch_size, num_heads, query_len, head_dim] of 1 to 8 tokens.
            seq_starts: int32 [batch_size], the first token of every row that may be seen, counted from the row's very
                first; None for that.
            window: Tokens that a token sees, itself included; None for all, or what the store keeps.
            scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
            softcap: Logits become softcap * tanh(logits / softcap).
            sinks: [num_heads], a logit of each head that takes weight and gives no value.

        Returns:
            [batch_size, query_len, num_heads, head_dim]; NaN where tokens did not fit.
        """
        sinks = None if sinks is None else sinks.detach().float()
        length, full_precision = self.length, self.full_precision
        look = seen_by if length.is_counted and not torch.compiler.is_compiling() else seen_by.__wrapped__
        seen = look(
            length.stop,
            query.shape[2],
            length.num_dropped,
            length.room,
            length.sizes,
            window if length.window is None else length.window,
            seq_starts,
            length.row_starts,
            self.pages.batch_size,
            query.device,
        )
        batch_size, num_heads, query_len, head_dim = query.shape
        tokens = query.transpose(1, 2).flatten(0, 1)
        output, lse = self.pages.attend(
            tokens, seen, scale=scale, softcap=softcap, sinks=sinks, return_lse=full_precision is not None
        )
        if full_precision is not None:
            assert seen.places is not None
            raw = (full_precision.keys, full_precision.values, seen.places)
            merge_attention(tokens, output, lse, *raw, scale=scale, softcap=softcap, follows_attention=seen.has_codes)
        output = output.view(batch_size, query_len, num_heads, head_dim)
        return output if seen.overflow is None else output + seen.overflow.to(output.dtype)

    def warm_up(self, dtype: torch.dtype, *, attends: bool = True) -> None:
        """Do what a step does, so that what is kept from call to call is not made while a CUDA graph is recorded.

        Args:
            dtype: Of queries.
            attends: Whether steps attend on codes, where there is a kernel for that.
        """
        self.pages.warm_up(dtype)
        if attends and self.pages.has_kernel:
            shape = (self.batch_size, self.num_kv_heads, 1, self.config.head_dim)
            self.attend(self.pages.tensor.new_zeros(shape, dtype=dtype), scale=None)

    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        num_seen = self.length.num_seen
        if num_tokens >= num_seen:
            return
        if self.full_precision is not None:
            self.full_precision.forget(num_tokens, num_seen, self.length.row_starts)
        self._fill(self.length.missing(num_tokens))
        self.length.crop(num_tokens)
        self.pages.crop(self.length, (num_tokens, num_seen))

    def clear(self) -> None:
        """Forget every token; the next ones are the first."""
        if self.full_precision is not None:
            self.full_precision.clear()
        self.length.clear()
        self.pages.crop(self.length, None)

    def trim(self) -> None:
        """Drop the blocks that no later token sees."""
        self.pages.drop(self.length.drop())

    def select_rows(self, rows: torch.Tensor) -> "Store":
        """The rows `rows`, int64 [any], in a store of their own; a static one puts its own in that order."""
        rows, full_precision = rows.to(self.pages.device), self.full_precision
        return Store(
            self.pages.select(rows, self.length.num_slots()),
            self.length.select(rows),
            None if full_precision is None else full_precision.select(rows),
        )

    def to(self, device: torch.device | str) -> "Store":
        """The same store on another device, without waiting; this one stays as it is for whoever reads it."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        full_precision = None if self.full_precision is None else self.full_precision.map(move)
        return Store(self.pages.map(move), self.length.map(move), full_precision)

    def _read(self, dtype: torch.dtype, *, num_new: int | None, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What codes and full precision say of all tokens.

        Args:
            dtype: Type of the result.
            num_new: Of how many of the last tokens the first sees recent ones as they are; None if none does of the
                last call.
            room: Positions after the last, of arbitrary content.
        """
        length, full_precision, stop = self.length, self.full_precision, self.length.num_slots(room)
        if room:
            self.pages.reserve(stop, length)
        first = self._first_read(num_new)
        keys, values = self.pages.read(first - length.num_dropped, stop, dtype)
        if full_precision is None:
            return keys, values
        if num_new is not None and length.sizes.recent:
            keys, values = full_precision.over_recent(keys, values, first, length.first_recent(num_new), length.stop)
        return full_precision.over_first(keys, values, first, length.row_starts)

    def _first_read(self, num_new: int | None) -> int:
        """The first position that `num_new` tokens read together; see `Length.num_read`."""
        return self.length.num_dropped + self.length.num_slots() - self.length.num_read(num_new)

    def _recent(self, num_new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The recent tokens that the first of the last `num_new` reads as they are, and all after it."""
        first, full_precision = self.length.first_recent(num_new), self.full_precision
        assert isinstance(first, int)
        assert full_precision is not None
        return full_precision.recent(first, self.length.num_seen)

    def _fill(self, missing: Missing) -> None:
        """Let full precision say what the codes do of recent tokens that it has not."""
        if missing is not None and self.full_precision is not None:
            start, stop = missing
            slots = start - self.length.num_dropped, stop - self.length.num_dropped
            self.full_precision.fill(*self.pages.read(*slots, self.full_precision.keys.dtype), start)
            self.length.filled(start)

    def _marked(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        overflow = self.length.overflow()
        return (keys, values) if overflow is None else (keys + overflow.to(keys.dtype), values)
