"""Launch the warpgroup kernel of `cache_update`."""

from functools import cache

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.kernels.split_rotation import split_rotation
from turboquant_core.ops.kernels.warpgroup_update.columns import product_columns
from turboquant_core.ops.kernels.warpgroup_update.kernel import warpgroup_update_kernel
from turboquant_core.ops.kernels.warpgroup_update.lane_table import lane_table

# Tokens of a tile: what one warpgroup multiplies at a time.
TILE_TOKENS = 64
NUM_WARPS = 4
# Three programs hide each other's waits. A fourth would leave a thread 128 registers; ptxas then orders the code of a
# tile so that look-ups wait for each other: 21.9 us for 8,192 tokens of 8 heads on an H200, not 19.9.
PROGRAMS_PER_SM = 3
MAX_REGISTERS = 168


def warpgroup_cache_update(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: KVCacheLayout,
    *,
    key_mean: torch.Tensor | None = None,
) -> None:
    """See `turboquant_core.ops.cache_update.cache_update`."""
    num_tokens = key.shape[0]
    if num_tokens == 0:
        return
    config, device = layout.config, pages.device
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    key_table = lane_table(config.head_dim, key_bits, device)
    value_table = lane_table(config.head_dim, value_bits, device)
    key_parts = _ordered_rotation(config.head_dim, key_bits, key.dtype, device)
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(pages):
        warpgroup_update_kernel[(num_programs(num_tokens, layout.num_kv_heads, _num_sms(device)),)](
            key,
            value,
            None if key_mean is None else key_mean.contiguous(),
            pages,
            slot_mapping,
            key_parts,
            _ordered_rotation(config.head_dim, value_bits, key.dtype, device),
            key_table.lanes,
            value_table.lanes,
            num_tokens,
            pages.shape[0],
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            pages.stride(0),
            pages.stride(1),
            slot_mapping.stride(0),
            key_table.factor,
            value_table.factor,
            num_kv_heads=layout.num_kv_heads,
            block_size=layout.block_size,
            channels=config.head_dim,
            num_parts=key_parts.shape[0],
            key_bits=key_bits,
            value_bits=value_bits,
            key_rule=config.key_scale,
            value_rule=config.value_scale,
            key_codes=layout.key_codes.offset,
            value_codes=layout.value_codes.offset,
            key_code_stride=layout.key_codes.slot_stride,
            value_code_stride=layout.value_codes.slot_stride,
            key_scales=layout.key_scales.offset,
            value_scales=layout.value_scales.offset,
            scale_stride=layout.key_scales.slot_stride,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )


def num_programs(num_tokens: int, num_kv_heads: int, num_sms: int) -> int:
    """Programs of a launch, a multiple of 2 * num_kv_heads: each has keys, or values, of one head."""
    tiles = -(-num_tokens // TILE_TOKENS)
    return 2 * num_kv_heads * min(tiles, max(1, PROGRAMS_PER_SM * num_sms // (2 * num_kv_heads)))


@cache
def _ordered_rotation(head_dim: int, bits: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    parts = split_rotation(head_dim, dtype, device).parts
    return parts[..., product_columns(head_dim, bits).to(device)].contiguous()


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
