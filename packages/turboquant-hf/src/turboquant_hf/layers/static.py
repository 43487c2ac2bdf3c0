"""The cache for compiled decoding: storage made once, and written in place."""

from typing import Any, NoReturn

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_hf._compat import StaticLayer
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.storage import traced
from turboquant_hf.storage.codec import LayerCodec
from turboquant_hf.storage.full_precision import KeptTokens
from turboquant_hf.storage.page_ops import num_blocks
from turboquant_hf.storage.store import PagedStates, tokens_first
from turboquant_hf.storage.tables import block_table


class StaticPagedStates(PagedStates):
    """Keys and values of at most `max_length` tokens a row, in tensors that keep their addresses.

    The number of tokens is a tensor, so that one compiled step, or one CUDA graph, serves every length. What does not
    fit is not stored and turns what is attended to into NaN: a graph cannot raise an error.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        device: Where pages are.
        max_length: The most tokens of a row.
        kept: What keeps sinks and the newest tokens as they are; None to keep codes only.
    """

    def __init__(
        self,
        config: TurboQuantConfig,
        batch_size: int,
        num_kv_heads: int,
        device: torch.device,
        max_length: int,
        kept: KeptTokens | None = None,
    ) -> None:
        super().__init__(config, batch_size, num_kv_heads, device, kept)
        self.max_length = max_length
        # Zeroed: unwritten slots are read, and masked.
        self.pages = self.pages.new_zeros(num_blocks(max_length), *self.pages.shape[1:])
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self._table = block_table(len(self.pages), batch_size, device).clone()
        self._is_empty = True
        # Whether a call that was interrupted may have written over the window.
        self._is_torn = False
        _keep_addresses(self.pages, self.length, self._table, *(kept.tensors() if kept is not None else []))

    @property
    def num_tokens(self) -> int:
        """Tokens of a row; waits for the device."""
        return int(self.length)

    @property
    def stored_length(self) -> int:
        """All that there is room for."""
        return self.max_length

    @property
    def is_empty(self) -> bool:
        """Whether the next tokens are the first."""
        return self._is_empty

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [*super().tensors(), self.length, self._table]

    def append(self, keys: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor | None = None) -> None:
        """See `PagedStates.append`."""
        self._num_new = num_new = keys.shape[-2]
        if num_new == 0:
            return
        if self._is_empty and num_new > self.max_length:
            raise IndexError(
                f"the prompt has {num_new} tokens and the cache was made for max_length={self.max_length}; make it "
                "with a larger max_length"
            )
        if self._is_empty:
            # A call that was interrupted here may have left a length.
            self.length.zero_()
        if self.kept is not None:
            if self._is_empty:
                self._begin_rows(self.kept, row_starts)
            self._mend_window()
            if not torch.compiler.is_compiling():
                self._is_torn = num_new > MAX_QUERY_LEN and not self._is_empty
            self.kept.write(keys, values, self.length)
        keys, values = tokens_first(keys), tokens_first(values)
        if self._is_empty:
            # Sinks are far from all others; a prompt of nothing else has to do.
            num_sinks = self._num_sinks if num_new > self._num_sinks else 0
            self._keep_codec(self._calibrated(keys, values, num_sinks, row_starts))
        slots = torch.arange(num_new, device=self.pages.device) + self.length
        traced.write(self.pages, keys, values, torch.where(slots < self.max_length, slots, -1), self._codec())
        self.length.add_(num_new)
        self._is_empty = self._is_torn = False

    @property
    def parts_calls(self) -> bool:
        """Never: how many tokens are stored is known on the device alone."""
        return False

    def extend(self, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PagedStates.extend`."""
        num_new = keys.shape[-2]
        if not self._num_recent or num_new <= MAX_QUERY_LEN:
            self.append(keys, values)
            return self.dequantize(dtype)
        self._num_new = 0
        self._mend_window()
        read = super().dequantize(dtype)
        at = (torch.arange(num_new, device=self.pages.device) + self.length).clamp(max=self.max_length - 1)
        self.append(keys, values)
        for states, new in zip(read, (keys, values), strict=True):
            states.index_copy_(2, at, new.detach())
        return read[0] + self._overflow(dtype), read[1]

    def attend(self, query: torch.Tensor, **options: Any) -> torch.Tensor:
        """See `PagedStates.attend`; NaN where tokens did not fit."""
        return super().attend(query, **options) + self._overflow(query.dtype)

    def dequantize(self, dtype: torch.dtype, *, with_recent: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PagedStates.dequantize`; tokens past the last are arbitrary, and keys NaN where some did not fit."""
        keys, values = super().dequantize(dtype, with_recent=with_recent)
        return keys + self._overflow(dtype), values

    def stored(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PagedStates.stored`; waits for the device."""
        keys, values = super().stored(dtype)
        return keys[:, :, : self.num_tokens], values[:, :, : self.num_tokens]

    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        if num_tokens < self.num_tokens or self._is_torn:
            self._refill(min(num_tokens, self.num_tokens))
        self.length.clamp_(max=num_tokens)
        if self.kept is not None and self.kept.row_starts is not None:
            self.kept.row_starts.clamp_(max=num_tokens)
        self._is_empty = num_tokens == 0

    def clear(self) -> None:
        """Forget every token, without waiting for the device; storage stays where it is."""
        self.length.zero_()
        self._is_empty = True

    def select_rows(self, rows: torch.Tensor) -> PagedStates:
        """Take the rows `rows`, int64 [batch_size], in place."""
        if len(rows) != self.batch_size:
            raise ValueError(
                f"{len(rows)} rows of a static cache of {self.batch_size} were picked; it keeps its batch size. Use a "
                "cache without max_length."
            )
        selected = super().select_rows(rows)
        self.pages.copy_(selected.pages)
        for held, new in ((self.codec, selected.codec), (self.kept, selected.kept)):
            if held is not None and new is not None:
                _copy(held, new)
        return self

    def warm_up(self) -> None:
        """Attend once, so that what kernels keep from call to call is not made while a CUDA graph is recorded."""
        query = self.pages.new_zeros(self.batch_size, self.num_kv_heads, 1, self.config.head_dim, dtype=torch.float16)
        self.attend(query, scale=None)

    def _begin_rows(self, kept: KeptTokens, row_starts: torch.Tensor | None) -> None:
        """Have rows start there, in a tensor that stays where it is once there was a padded batch."""
        if kept.row_starts is not None:
            kept.row_starts.copy_(torch.zeros_like(kept.row_starts) if row_starts is None else row_starts)
        elif row_starts is not None and kept.sink_tokens:
            kept.row_starts = row_starts.clone()
            _keep_addresses(kept.row_starts)

    def _mend_window(self) -> None:
        """Fill the window from the codes if a call that was interrupted may have written over it."""
        if self._is_torn and not torch.compiler.is_compiling():
            self._refill(self.num_tokens)

    def _keep_codec(self, codec: LayerCodec) -> None:
        if self.codec is None:
            self.codec = codec.map(torch.clone)
            _keep_addresses(*self.codec.tensors())
        else:
            _copy(self.codec, codec)

    def _overflow(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.where(self.length > self.max_length, torch.nan, 0.0).to(dtype)

    def _block_table(self) -> torch.Tensor:
        return self._table

    def _row_lengths(self) -> torch.Tensor:
        return (self.length - self._num_recent).clamp(0, self.max_length).int().repeat(self.batch_size)

    def _length(self) -> int | torch.Tensor:
        return self.length

    def _sees_codes(self, window: int | None) -> bool:
        return window is None or window > self._num_recent

    def _overlay(
        self, kept: KeptTokens, keys: torch.Tensor, values: torch.Tensor, with_recent: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(self.max_length, device=self.pages.device)
        if kept.recent_tokens and with_recent:
            first = self.length - self._num_new - kept.recent_tokens + 1
            is_recent = (position >= first) & (position < self.length)
            slots = kept.sink_tokens + position % kept.ring_size
            keys, values = (
                torch.where(is_recent[:, None], held.index_select(2, slots), states)
                for states, held in ((keys, kept.keys), (values, kept.values))
            )
        return kept.with_sinks(keys, values)

    def _refill(self, num_tokens: int) -> None:
        kept = self.kept
        if kept is None or not kept.recent_tokens:
            return
        # What the slots of tokens that are taken back held before.
        start = max(kept.sink_tokens, num_tokens - kept.ring_size)
        stop = num_tokens if self._is_torn else min(num_tokens, self.num_tokens - kept.ring_size)
        if start < stop:
            self._fill_from_codes(kept, start, stop)
        self._is_torn = False


class TurboQuantStaticLayer(TurboQuantLayer):
    """A layer for `torch.compile` and CUDA graphs: preallocated, written in place, at fixed addresses.

    Without `attn_implementation="turboquant"` every step dequantises the whole of it.

    Args:
        max_length: The most tokens of a sequence.
        preset: As for `TurboQuantLayer`.
        **options: As there.
    """

    states: StaticPagedStates

    is_compileable = True

    def __init__(
        self,
        max_length: int,
        preset: str = "tq4",
        **options: Any,
    ) -> None:
        super().__init__(preset, **options)
        self._max_length = max_length

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """Tokens stored, an int64 tensor [] once there are any."""
        return self.states.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self._max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys: all that there is room for."""
        return self._max_length, 0

    @outside_inference_mode
    def reset(self) -> None:
        """Forget every token; storage stays where it is."""
        if self.is_initialized:
            self.states.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: storage has a fixed batch size."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused: storage has a fixed batch size."""
        self._refuse("batch_select_indices")

    def offload(self) -> None:
        """Refused: storage has fixed addresses."""
        self._refuse("offloading")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{what} does not go with max_length: a static cache stays where and as large as it is")

    def _new_states(self, batch_size: int, num_kv_heads: int) -> PagedStates:
        kept = self._new_kept(batch_size, num_kv_heads)
        return StaticPagedStates(self.config, batch_size, num_kv_heads, self.device, self._max_length, kept)

    def _before_decoding(self) -> None:
        if self.states.pages.is_cuda and not torch.compiler.is_compiling() and self.states.has_kernel:
            self.states.warm_up()

    def _prompt(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        room = (0, 0, 0, self._max_length - key_states.shape[-2])
        return torch.nn.functional.pad(key_states, room), torch.nn.functional.pad(value_states, room)


class StaticWindowLayer(StaticLayer):
    """Transformers' static layer with room for all tokens, of which each sees a window, which the mask says.

    Args:
        max_cache_len: The most tokens of a sequence.
        sliding_window: Tokens that a token sees, itself included.
    """

    is_sliding = True

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len)
        self.sliding_window = sliding_window


class TurboQuantStaticSlidingLayer(TurboQuantStaticLayer):
    """A layer for `torch.compile` whose tokens see a window, which the mask says.

    The codes of all `max_length` tokens are kept, and no sinks or recent tokens. At 4 bits they take more than a window
    in bfloat16 where `max_length` is some four windows or more.

    Args:
        max_length: The most tokens of a sequence.
        sliding_window: Tokens that a token sees, itself included.
        preset: As for `TurboQuantLayer`.
        **options: As there.
    """

    is_sliding = True

    def __init__(self, max_length: int, sliding_window: int, preset: str = "tq4", **options: Any) -> None:
        super().__init__(max_length, preset, **options)
        self.sliding_window = sliding_window


def _keep_addresses(*tensors: torch.Tensor) -> None:
    """Let CUDA graphs read and write these tensors where they are."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def _copy(held: LayerCodec | KeptTokens, source: LayerCodec | KeptTokens) -> None:
    for tensor, new in zip(held.tensors(), source.tensors(), strict=True):
        tensor.copy_(new)
