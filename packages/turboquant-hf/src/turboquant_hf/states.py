"""The stored keys and values of one layer, in the pages that core's kernels attend on."""

from copy import copy
from typing import Any

import torch

from turboquant_core import KVCacheLayout, QuantizedTensor, TurboQuantConfig
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.quantized import storage_nbytes
from turboquant_core.vector_format import OUTLIER_BITS
from turboquant_hf.codec import LayerCodec, Quantizer, map_order
from turboquant_hf.tables import block_table, row_lengths, slot_range

BLOCK_SIZE = 64
# Storage that is full grows by a thirty-second, and a block: a token is copied some thirty times in all, where every
# step of decoding reads all of them, and little is unused.
GROWTH_DIVISOR = 32
# Coordinates dequantised at a time, in float32: what bounds the working set beside the result.
DEQUANTIZED_AT_ONCE = 1 << 22


class PagedStates:
    """Keys and values [batch_size, num_kv_heads, num_tokens, head_dim] of one layer, kept as codes and scales only.

    The rows of a batch have equally many tokens, so that B rows of H heads are one row of B * H heads: token t of every
    row and head is slot t % 64 of page t // 64. Growing, cropping and picking rows are operations on whole pages or on
    their second dimension.

    What depends on data, the key mean and the outlier channels, comes from the first tokens appended, for each row and
    head apart, and is kept from then on: every stored token is read with what it was written with.

    Args:
        config: What is stored for one head.
        batch_size: Rows B.
        num_kv_heads: Heads H.
        device: Where pages are.
    """

    def __init__(self, config: TurboQuantConfig, batch_size: int, num_kv_heads: int, device: torch.device) -> None:
        self.config = config
        self.num_kv_heads = num_kv_heads
        self.layout = KVCacheLayout(config, batch_size * num_kv_heads, BLOCK_SIZE)
        self.row_layout = KVCacheLayout(config, num_kv_heads, BLOCK_SIZE)
        self.pages = self.layout.allocate(0, device)
        self.num_tokens = 0
        self.codec: LayerCodec | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.layout.num_kv_heads // self.num_kv_heads

    @property
    def has_whole_bits(self) -> bool:
        """Whether core's kernels can store and read the codes."""
        return self.config.key_bits not in OUTLIER_BITS and self.config.value_bits not in OUTLIER_BITS

    @property
    def used_nbytes(self) -> int:
        """Bytes of the codes and scales of stored tokens."""
        return self.num_tokens * self.layout.num_kv_heads * self.layout.slot_bytes

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [self.pages, *(self.codec.tensors() if self.codec is not None else [])]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything kept."""
        return storage_nbytes(self.tensors())

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantise and store keys and values [batch_size, num_kv_heads, num_new, head_dim]."""
        num_new = keys.shape[-2]
        if num_new == 0:
            return
        keys, values = _tokens_first(keys.detach()), _tokens_first(values.detach())
        if self.codec is None:
            self.codec = LayerCodec.calibrate(self.config, keys, values)
        stop = self.num_tokens + num_new
        self._reserve(stop)
        slots = slot_range(self.num_tokens, stop, self.pages.device)
        if self.has_whole_bits:
            cache_update(keys, values, self.pages, slots, self.layout, key_mean=self.codec.key_mean)
        else:
            self._write(*self.codec.quantize(keys, values), slots)
        self.num_tokens = stop

    def dequantize(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All stored keys and values, [batch_size, num_kv_heads, num_tokens, head_dim].

        Raises:
            RuntimeError: If nothing is stored.
        """
        codec, views = self._codec(), self.layout.views(self.pages)
        keys = self._read(views.key_codes, views.key_scales, codec.keys, codec.key_mean, dtype)
        values = self._read(views.value_codes, views.value_scales, codec.values, None, dtype)
        shape = (self.batch_size, self.num_kv_heads, -1, self.config.head_dim)
        return keys.view(shape)[:, :, : self.num_tokens], values.view(shape)[:, :, : self.num_tokens]

    def can_attend(self, seq_starts: torch.Tensor | None, softcap: float | None, sinks: torch.Tensor | None) -> bool:
        """Whether `attend` serves such a call."""
        # Softcap and sinks need the score of the key mean, which is one for all rows in a call with starts.
        mean_is_needed = self.config.center_keys and (softcap or sinks is not None)
        return self.has_whole_bits and not (mean_is_needed and seq_starts is not None and self.batch_size > 1)

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
        """Causal attention of the last stored tokens on the codes.

        Args:
            query: [batch_size, num_heads, query_len, head_dim] of 1 to 8 tokens.
            scale: What logits are multiplied with.
            seq_starts: int32 [batch_size], the first token of every row that may be seen; None for the first stored.
            window: Tokens that a token sees, itself included; None for all.
            softcap: Logits become softcap * tanh(logits / softcap).
            sinks: [num_heads], a logit of each head that takes weight and gives no value.

        Returns:
            [batch_size, query_len, num_heads, head_dim].
        """
        batch_size, num_heads, query_len, head_dim = query.shape
        num_blocks, device = self.pages.shape[0], self.pages.device
        mean = self._codec().key_mean if softcap or sinks is not None else None
        sinks = None if sinks is None else sinks.detach().float()
        if seq_starts is None:
            out = _decode_attention(
                _tokens_first(query),
                self.pages,
                block_table(num_blocks, 1, device),
                row_lengths(self.num_tokens, 1, device),
                self.layout,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks if sinks is None or batch_size == 1 else sinks.repeat(batch_size),
                key_mean=mean,
            )
            return out.view(query_len, batch_size, num_heads, head_dim).transpose(0, 1)
        out = _decode_attention(
            query.transpose(1, 2).reshape(-1, num_heads, head_dim),
            self.pages.view(-1, self.num_kv_heads, self.layout.head_bytes),
            block_table(num_blocks, batch_size, device),
            row_lengths(self.num_tokens, batch_size, device),
            self.row_layout,
            scale=scale,
            seq_starts=seq_starts,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_mean=mean,
        )
        return out.view(batch_size, query_len, num_heads, head_dim)

    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; what that leaves unused beyond twice a growth is freed."""
        if num_tokens >= self.num_tokens:
            return
        self.num_tokens = num_tokens
        if num_tokens == 0:
            self.codec = None
        used = _num_blocks(num_tokens)
        # Drafts that are verified around the end of a block must not make it shrink and grow each time.
        if len(self.pages) > _grown(_grown(used)):
            self.pages = self.pages[:used].clone()

    def select_rows(self, rows: torch.Tensor) -> "PagedStates":
        """The rows `rows`, int64 [any], as states of their own."""
        rows = rows.to(self.pages.device)

        def select(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
            return torch.unflatten(x, dim, (self.batch_size, -1)).index_select(dim, rows).flatten(dim, dim + 1)

        selected = copy(self)
        selected.codec = None if self.codec is None else self.codec.map(select)
        selected.pages = select(self.pages[: _num_blocks(self.num_tokens)], dim=1)
        selected.layout = KVCacheLayout(self.config, selected.pages.shape[1], BLOCK_SIZE)
        return selected

    def to(self, device: torch.device | str) -> "PagedStates":
        """The same states on another device, without waiting; these stay as they are for whoever reads them."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        moved = copy(self)
        moved.codec = None if self.codec is None else self.codec.map(move)
        moved.pages = move(self.pages)
        return moved

    def _codec(self) -> LayerCodec:
        if self.codec is None:
            raise RuntimeError("there are no stored states to read")
        return self.codec

    def _reserve(self, num_tokens: int) -> None:
        needed, held = _num_blocks(num_tokens), len(self.pages)
        if needed <= held:
            return
        # A prompt is not followed by tokens in every case; what has grown once will grow again.
        grown = self.layout.allocate(needed if self.num_tokens == 0 else _grown(needed), self.pages.device)
        used = _num_blocks(self.num_tokens)
        grown[:used] = self.pages[:used]
        self.pages = grown

    def _write(self, keys: QuantizedTensor, values: QuantizedTensor, slots: torch.Tensor) -> None:
        """Store codes [num_tokens, heads] of bits that `cache_update` does not write."""
        views = self.layout.views(self.pages)
        block, position = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        views.key_codes[block, :, position] = keys.codes
        views.key_scales[block, :, position] = keys.scales
        views.value_codes[block, :, position] = values.codes
        views.value_scales[block, :, position] = values.scales

    def _read(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        quantizer: Quantizer,
        mean: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Stored vectors, [batch_size * num_kv_heads, at least num_tokens, head_dim]."""
        num_blocks = _num_blocks(self.num_tokens)
        head_dim, num_heads = self.config.head_dim, self.layout.num_kv_heads
        quantizer = map_order(quantizer, lambda order: order[:, None])
        states = torch.empty(num_heads, num_blocks, BLOCK_SIZE, head_dim, dtype=dtype, device=self.pages.device)
        step = max(1, DEQUANTIZED_AT_ONCE // (num_heads * BLOCK_SIZE * head_dim))
        for first in range(0, num_blocks, step):
            blocks = slice(first, min(first + step, num_blocks))
            # [blocks, heads, slots, channels]
            vectors = quantizer.dequantize(QuantizedTensor(codes[blocks], scales[blocks]))
            if mean is not None:
                vectors = vectors + mean[:, None]
            states[:, blocks] = vectors.transpose(0, 1)
        return states.flatten(1, 2)


def _decode_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    output = decode_attention(*args, **kwargs)
    assert isinstance(output, torch.Tensor)  # with no log-sum-exp
    return output


def _tokens_first(states: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_heads, num_tokens, head_dim] as [num_tokens, batch_size * num_heads, head_dim]."""
    return states.permute(2, 0, 1, 3).flatten(1, 2)


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def _grown(num_blocks: int) -> int:
    """Blocks to hold where `num_blocks` are needed."""
    return num_blocks + -(-num_blocks // GROWTH_DIVISOR)
