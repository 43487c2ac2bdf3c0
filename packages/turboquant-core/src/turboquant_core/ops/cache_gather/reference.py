"""`cache_gather` in plain PyTorch."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import existing_blocks, row_capacity
from turboquant_core.ops.cache_gather.output import empty_output
from turboquant_core.quantized import QuantizedTensor
from turboquant_core.split import quantizer_of


def cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    layout: KVCacheLayout,
    *,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    rotated_key_mean: torch.Tensor | None,
    key_dtype: torch.dtype,
    dtype: torch.dtype,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `turboquant_core.ops.cache_gather`."""
    config = layout.config
    views = layout.views(pages)
    keys, values = empty_output(pages, layout, key_dtype, dtype, max_tokens)
    capacity = row_capacity(len(pages), block_table.shape[1], layout.block_size)
    num_tokens = min(max_tokens, max(int(cu_seqlens[-1]), 0)) if capacity else 0
    token = torch.arange(num_tokens, dtype=torch.int32, device=pages.device)
    # As many rows as end at or before a token come before its own, whatever their order is.
    row = torch.searchsorted(cu_seqlens[1:].sort().values, token, right=True)
    position = token - cu_seqlens[row]
    if starts is not None:
        position = position + starts[row].clamp(min=0)
    position = position.clamp(0, max(capacity - 1, 0))
    block = existing_blocks(block_table[row, position // layout.block_size], len(pages))
    slot = (block, slice(None), position % layout.block_size)
    key = QuantizedTensor(views.key_codes[slot], views.key_scales[slot])
    value = QuantizedTensor(views.value_codes[slot], views.value_scales[slot])
    gathered = quantizer_of(config.key_format).dequantize_rotated(key)
    keys[: len(token)] = gathered if rotated_key_mean is None else gathered + rotated_key_mean
    values[: len(token)] = quantizer_of(config.value_format).dequantize_rotated(value)
    return keys, values
