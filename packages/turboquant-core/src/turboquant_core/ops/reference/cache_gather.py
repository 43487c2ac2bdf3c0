"""`cache_gather` in plain PyTorch."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import MSEQuantizer
from turboquant_core.quantized import QuantizedTensor


def cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: KVCacheLayout,
    *,
    starts: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `turboquant_core.ops.cache_gather.cache_gather`."""
    config = layout.config
    views = layout.views(pages)
    cu_seqlens = cumulative_lengths(seq_lens, starts)
    keys, values = empty_output(pages, layout, dtype, max_tokens)
    token = torch.arange(min(max_tokens, int(cu_seqlens[-1])), dtype=torch.int32, device=pages.device)
    row = torch.searchsorted(cu_seqlens[1:], token, right=True)
    position = token - cu_seqlens[row]
    if starts is not None:
        position = position + starts[row]
    block = block_table[row, position // layout.block_size]
    slot = (block, slice(None), position % layout.block_size)
    key = QuantizedTensor(views.key_codes[slot], views.key_scales[slot])
    value = QuantizedTensor(views.value_codes[slot], views.value_scales[slot])
    keys[: len(token)] = MSEQuantizer(config.head_dim, int(config.key_bits)).dequantize_rotated(key)
    values[: len(token)] = MSEQuantizer(config.head_dim, int(config.value_bits)).dequantize_rotated(value)
    return keys, values, cu_seqlens


def cumulative_lengths(seq_lens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """Where every row begins in the output, and the total, int32 [batch + 1]; computed on the device."""
    lengths = seq_lens if starts is None else seq_lens - starts
    ends = lengths.clamp(min=0).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))


def empty_output(
    pages: torch.Tensor, layout: KVCacheLayout, dtype: torch.dtype, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised keys and values, [max_tokens, num_kv_heads, head_dim]."""
    shape = (max_tokens, layout.num_kv_heads, layout.config.head_dim)
    return (
        torch.empty(shape, dtype=dtype, device=pages.device),
        torch.empty(shape, dtype=dtype, device=pages.device),
    )
