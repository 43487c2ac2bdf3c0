"""The stored keys and values of one layer."""

from copy import copy
from typing import Any

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_core.ops.merge_attention import merge_attention
from turboquant_core.quantized import storage_nbytes
from turboquant_hf.storage import traced
from turboquant_hf.storage.codec import LayerCodec
from turboquant_hf.storage.full_precision import KeptTokens
from turboquant_hf.storage.page_ops import BLOCK_SIZE, num_blocks, page_layout
from turboquant_hf.storage.tables import block_table, code_starts, row_lengths, slot_range

# Storage that is full grows by a thirty-second, and a block: a token is copied some thirty times in all, where every
# step of decoding reads all of them, and little is unused.
GROWTH_DIVISOR = 32


class PagedStates:
    """Keys and values [batch_size, num_kv_heads, num_tokens, head_dim] of one layer, kept as codes and scales.

    They are in pages that core's kernels attend on; see `page_ops`. Growing, cropping and picking rows are operations
    on whole pages or on their second dimension. Sinks and a window of the newest tokens may be kept beside them as they
    are; see `full_precision`.

    What depends on data, the key mean and the outlier channels, comes from the first tokens appended that are no sinks
    and not known to be padding, for each row and head apart, and is kept from then on: every stored token is read with
    what it was written with.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        device: Where pages are.
        kept: What keeps sinks and the newest tokens as they are; None to keep codes only.
    """

    def __init__(
        self,
        config: TurboQuantConfig,
        batch_size: int,
        num_kv_heads: int,
        device: torch.device,
        kept: KeptTokens | None = None,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        self.pages = page_layout(config, batch_size * num_kv_heads).allocate(0, device)
        self.kept = kept
        self.codec: LayerCodec | None = None
        self._num_tokens = 0
        self._num_new = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a row."""
        return self._num_tokens

    @property
    def stored_length(self) -> int:
        """Slots of a row that hold tokens, or may."""
        return self._num_tokens

    @property
    def read_length(self) -> int:
        """How many of them, the last ones, attention reads."""
        return self.stored_length

    @property
    def is_empty(self) -> bool:
        """Whether the next tokens are the first."""
        return self._num_tokens == 0

    @property
    def has_kernel(self) -> bool:
        """Whether `attend` can read the codes."""
        return self.codec is None or self.codec.has_whole_bits

    @property
    def used_nbytes(self) -> int:
        """Bytes of the codes and scales of stored tokens."""
        return self.num_tokens * self.batch_size * self.num_kv_heads * self.config.slot_bytes

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything kept."""
        return storage_nbytes(self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        parts = [part.tensors() for part in (self.codec, self.kept) if part is not None]
        return [self.pages, *(tensor for part in parts for tensor in part)]

    def append(self, keys: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor | None = None) -> None:
        """Quantise and store keys and values [batch_size, num_kv_heads, num_new, head_dim].

        Args:
            keys: New keys.
            values: New values.
            row_starts: With the first tokens of all, which of them is the first of every row that is no padding, int32
                [batch_size]; None where no row is padded.
        """
        num_new = keys.shape[-2]
        if num_new == 0:
            self._num_new = 0
            return
        if self.kept is not None:
            if self.is_empty:
                self.kept.row_starts = row_starts if self._num_sinks else None
            # A call that was interrupted here may have written over the window.
            self._refill(self._num_tokens)
            self.kept.write(keys, values, self._num_tokens)
            # Sinks may come in several calls, and where rows start with the first.
            row_starts = row_starts if self.kept.row_starts is None else self.kept.row_starts
        keys, values = tokens_first(keys), tokens_first(values)
        stop = self._num_tokens + num_new
        self._reserve(stop)
        if self._num_tokens <= self._num_sinks < stop:
            # Sinks are far from all others, and take no part in the mean.
            before = self._before_sinks(keys.dtype)
            self.codec = self._calibrated(keys, values, self._num_sinks - self._num_tokens, row_starts)
            if before is not None:
                traced.write(self.pages, *before, slot_range(0, self._num_tokens, self.pages.device), self.codec)
        elif self.codec is None and self._num_uncoded < stop:
            self.codec = self._calibrated(keys, values, 0, row_starts)
        if self.codec is None:
            # Kernels skip the slots of sinks, and still must not find infinite scales there.
            self.pages.zero_()
        else:
            slots = slot_range(self._num_tokens, stop, self.pages.device)
            traced.write(self.pages, keys, values, slots, self.codec)
        self._num_tokens, self._num_new = stop, num_new

    @property
    def parts_calls(self) -> bool:
        """Whether the tokens of a call see different ones as they are; see `dequantize_parts`."""
        return self._num_recent > 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and dequantise what attention of the new tokens reads; see `dequantize`.

        With a window the new tokens read each other, and the window before the first of them, as they are.
        """
        recent = self.append_parts(keys, values)
        read = self.dequantize(dtype)
        if recent is not None:
            for states, newest in zip(read, recent, strict=True):
                states[:, :, self._num_tokens - newest.shape[2] :] = newest
            assert self.kept is not None
            # The ring has not what came where a padded row has sinks.
            read = self.kept.with_sinks(*read)
        return read

    def append_parts(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Append, and give what may leave the ring thereby: the window before the new tokens, and these.

        Returns:
            Keys and values of the last positions, as they are; None where the ring holds them all.
        """
        kept, before = self.kept, self._num_tokens
        if kept is None or not kept.recent_tokens or keys.shape[-2] <= MAX_QUERY_LEN:
            self.append(keys, values)
            return None
        self._refill(before)
        window = kept.recent(self._first_recent(before, 0), before)
        self.append(keys, values)
        recent_keys, recent_values = (
            torch.cat([held, new.detach()], dim=2) for held, new in zip(window, (keys, values), strict=True)
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
            Keys and values [batch_size, num_kv_heads, num_tokens + num_recent, head_dim]: what all codes and the sinks
            say, and then the last num_recent tokens as they are; and which of the two a token reads, bool [1 or
            batch_size, num_new, num_tokens + num_recent]: of every token one, of those after it what they are.
        """
        kept, length = self.kept, self._num_tokens
        assert kept is not None
        if recent is None:
            recent = kept.recent(self._first_recent(length, self._num_new), length)
        num_recent = recent[0].shape[2]
        stored = self.dequantize(dtype, with_recent=False)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(stored, recent, strict=True))
        position = torch.arange(length, device=keys.device)
        query, last = position[length - self._num_new :, None], position[length - num_recent :]
        sinks_end = kept.sinks_end
        if isinstance(sinks_end, torch.Tensor):
            sinks_end = sinks_end[:, None, None]
        near = (last > query - kept.recent_tokens) & (last >= sinks_end)
        # Not view(-1, ...): where there is none that size is not known.
        near = near if near.ndim == 3 else near[None]
        far = near.new_ones(len(near), self._num_new, length - num_recent)
        return keys, values, torch.cat([far, ~near, near], dim=-1)

    def dequantize(self, dtype: torch.dtype, *, with_recent: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that attention reads, [batch_size, num_kv_heads, read_length, head_dim].

        Args:
            dtype: Their type.
            with_recent: Give recent tokens as they are, those that the first token of the last call sees so.

        Raises:
            RuntimeError: If nothing is stored.
        """
        kept, length = self.kept, self.stored_length
        shape = (self.batch_size, self.num_kv_heads, -1, self.config.head_dim)
        tokens = slice(length - self.read_length, length)
        if self.codec is None and length:
            # Sinks and padding alone.
            read = self.pages.new_zeros(2, self.pages.shape[1], length, self.config.head_dim, dtype=dtype).unbind()
        else:
            read = traced.read(self.pages, num_blocks(length), self._codec(), dtype)
        keys, values = (states.view(shape)[:, :, tokens] for states in read)
        return (keys, values) if kept is None else self._overlay(kept, keys, values, with_recent)

    def stored(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a next call would read, [batch_size, num_kv_heads, num_tokens, head_dim]."""
        twin = copy(self)
        twin._num_new = 0
        return twin.dequantize(dtype)

    def attend(
        self,
        query: torch.Tensor,
        *,
        scale: float | None,
        seq_starts: torch.Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the last stored tokens on the codes, and on what is kept; see `page_ops.attend`."""
        sinks = None if sinks is None else sinks.detach().float()
        options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        kept = self.kept
        if kept is None:
            options |= {"sinks": sinks, "return_lse": False}
            return self._attend_codes(query, seq_starts=seq_starts, window=window, **options)[0]
        call = kept.call(self._length(), query.shape[2], seq_starts, window)
        codes = None
        if self._sees_codes(window):
            codes = self._attend_codes(
                query,
                seq_starts=self._code_starts(seq_starts),
                # The codes that a token sees end before its window, as if it came as many tokens earlier.
                window=None if window is None else window - kept.recent_tokens,
                sinks=None,
                return_lse=True,
                **options,
            )
        return merge_attention(query, call.keys, call.values, call.bias, codes, sinks=sinks, **options)

    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; what that leaves unused beyond twice a growth is freed."""
        if num_tokens >= self._num_tokens:
            return
        self._refill(num_tokens)
        self._num_tokens, self._num_new = num_tokens, 0
        if self.kept is not None and self.kept.row_starts is not None:
            # A row of which padding alone is left begins with what comes.
            self.kept.row_starts = self.kept.row_starts.clamp(max=num_tokens)
        if num_tokens <= self._num_uncoded:
            self.codec = None
        used = num_blocks(num_tokens)
        # Drafts that are verified around the end of a block must not make it shrink and grow each time.
        if len(self.pages) > _grown(_grown(used)):
            self.pages = self.pages[:used].clone()

    def clear(self) -> None:
        """Forget every token; the next ones are the first."""
        self.crop(0)

    def select_rows(self, rows: torch.Tensor) -> "PagedStates":
        """The rows `rows`, int64 [any], as states of their own."""
        rows = rows.to(self.pages.device)

        def select(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
            by_row = torch.unflatten(x, dim, (self.batch_size, self.num_kv_heads))
            return by_row.index_select(dim, rows).flatten(dim, dim + 1)

        selected = copy(self)
        selected.batch_size = len(rows)
        selected.pages = select(self.pages[: num_blocks(self.stored_length)], dim=1)
        selected.codec = None if self.codec is None else self.codec.map(select)
        selected.kept = None if self.kept is None else self.kept.map(lambda x: x.index_select(0, rows))
        return selected

    @classmethod
    def restore(
        cls,
        config: TurboQuantConfig,
        batch_size: int,
        num_tokens: int,
        pages: torch.Tensor,
        codec: LayerCodec | None,
        kept: KeptTokens | None,
    ) -> "PagedStates":
        """States whose tokens are in these pages."""
        states = cls(config, batch_size, pages.shape[1] // batch_size, pages.device, kept)
        states.pages, states.codec, states._num_tokens = pages, codec, num_tokens
        return states

    def to(self, device: torch.device | str) -> "PagedStates":
        """The same states on another device, without waiting; these stay as they are for whoever reads them."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        moved = copy(self)
        moved.pages = move(self.pages)
        moved.codec = None if self.codec is None else self.codec.map(move)
        moved.kept = None if self.kept is None else self.kept.map(move)
        return moved

    @property
    def _num_sinks(self) -> int:
        """First tokens of a row that are read as they are."""
        return 0 if self.kept is None else self.kept.sink_tokens

    @property
    def _num_uncoded(self) -> int:
        """First tokens of which no codes are read: sinks. Where rows are padded, a mask may show the padding."""
        return 0 if self.kept is not None and self.kept.row_starts is not None else self._num_sinks

    @property
    def _num_recent(self) -> int:
        """Newest tokens that are not read as codes."""
        return 0 if self.kept is None else self.kept.recent_tokens

    def _calibrated(
        self, keys: torch.Tensor, values: torch.Tensor, num_sinks: int, row_starts: torch.Tensor | None
    ) -> LayerCodec:
        """The codec of [num_new, batch_size * num_kv_heads, head_dim], of which the first `num_sinks` do not count."""
        if row_starts is None:
            return LayerCodec.calibrate(self.config, keys[num_sinks:], values[num_sinks:])
        # A row of sinks and padding alone has to have a mean, too.
        first = (row_starts + num_sinks).clamp(max=len(keys) - 1).repeat_interleave(self.num_kv_heads)
        counts = torch.arange(len(keys), device=keys.device)[:, None] >= first
        return LayerCodec.calibrate(self.config, keys, values, counts)

    def _before_sinks(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values [num_tokens, batch_size * num_kv_heads, head_dim] that have codes before the last sink."""
        if self.codec is None or not self._num_tokens:
            return None
        read = traced.read(self.pages, num_blocks(self._num_tokens), self.codec, dtype)
        keys, values = (states[:, : self._num_tokens].transpose(0, 1) for states in read)
        return keys, values

    def _attend_codes(self, query: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return traced.attend(query, self.pages, self._block_table(), self._row_lengths(), self._codec(), **options)

    def _sees_codes(self, window: int | None) -> bool:
        """Whether any token of a call may see any codes."""
        in_window = window is None or window > self._num_recent
        return in_window and self._num_tokens - self._num_recent > self._num_uncoded

    def _code_starts(self, starts: torch.Tensor | None) -> torch.Tensor | None:
        """The first position of every row that is read as codes, int32 [batch_size]; None for the very first."""
        num_sinks = self._num_sinks
        if self.kept is not None and self.kept.row_starts is not None:
            return code_starts(self._length(), num_sinks, starts, self.kept.row_starts)
        if not num_sinks:
            return starts
        if starts is None:
            return row_lengths(num_sinks, self.batch_size, self.pages.device)
        return starts.clamp(min=num_sinks)

    def _length(self) -> int | torch.Tensor:
        return self._num_tokens

    def _overlay(
        self, kept: KeptTokens, keys: torch.Tensor, values: torch.Tensor, with_recent: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the codes of all stored tokens say, with what is kept written over it."""
        first = self._first_recent(self._num_tokens, self._num_new) if with_recent else self._num_tokens
        for states, newest in zip((keys, values), kept.recent(first, self._num_tokens), strict=True):
            states[:, :, first:] = newest
        return kept.with_sinks(keys, values)

    def _first_recent(self, num_tokens: int, num_new: int) -> int:
        """The first position that is read as it is, of the window of the token that the last `num_new` begin with."""
        kept = self.kept
        if kept is None or not kept.recent_tokens:
            return num_tokens
        return min(num_tokens, max(kept.sink_tokens, kept.held_from, num_tokens - num_new - kept.recent_tokens + 1))

    def _refill(self, num_tokens: int) -> None:
        """Before a crop: fill the window from the codes where more is taken back than the ring has room for."""
        kept = self.kept
        if kept is None or not kept.recent_tokens:
            return
        needed = max(kept.sink_tokens, num_tokens - kept.recent_tokens + 1)
        kept.held_from = min(kept.held_from, num_tokens)
        if needed < kept.held_from:
            self._fill_from_codes(kept, needed, kept.held_from)
            kept.held_from = needed

    def _fill_from_codes(self, kept: KeptTokens, start: int, stop: int) -> None:
        """Let the ring say what the codes of the positions start to stop - 1 do."""
        first = start // BLOCK_SIZE
        read = traced.read(self.pages[first:], num_blocks(stop) - first, self._codec(), kept.keys.dtype)
        shape = (self.batch_size, self.num_kv_heads, -1, self.config.head_dim)
        tokens = slice(start - first * BLOCK_SIZE, stop - first * BLOCK_SIZE)
        keys, values = (states.view(shape)[:, :, tokens] for states in read)
        kept.put_back(keys, values, start)

    def _block_table(self) -> torch.Tensor:
        return block_table(len(self.pages), self.batch_size, self.pages.device)

    def _row_lengths(self) -> torch.Tensor:
        return row_lengths(max(0, self._num_tokens - self._num_recent), self.batch_size, self.pages.device)

    def _codec(self) -> LayerCodec:
        if self.codec is None:
            raise RuntimeError("there are no stored states to read")
        return self.codec

    def _reserve(self, num_tokens: int) -> None:
        needed = num_blocks(num_tokens)
        if needed <= len(self.pages):
            return
        # Nobody knows whether a prompt is followed by anything; what has grown once will grow again.
        held = needed if self.is_empty else _grown(needed)
        grown = self.pages.new_empty(held, *self.pages.shape[1:])
        used = num_blocks(self._num_tokens)
        grown[:used] = self.pages[:used]
        self.pages = grown


def tokens_first(states: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_heads, num_tokens, head_dim] as [num_tokens, batch_size * num_heads, head_dim]."""
    # Inkling's keys come with channels apart, and operations want those of a head side by side.
    states = states.detach() if states.stride(-1) == 1 else states.detach().contiguous()
    return states.permute(2, 0, 1, 3).flatten(1, 2)


def _grown(needed: int) -> int:
    """Blocks to hold where so many are needed."""
    return needed + -(-needed // GROWTH_DIVISOR)
