"""Launch the warpgroup kernel of `cache_update`."""

from functools import cache

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._triton.layout import layout_constants
from turboquant_core.ops.cache_update.split_rotation import split_rotation
from turboquant_core.ops.cache_update.warpgroup.columns import product_columns
from turboquant_core.ops.cache_update.warpgroup.kernel import warpgroup_update_kernel
from turboquant_core.ops.cache_update.warpgroup.lane_table import lane_table

# Tokens of a tile: what one warpgroup multiplies at a time.
TILE_TOKENS = 64
NUM_WARPS = 4
# Three programs hide each other's waits. A fourth would leave a thread 128 registers; ptxas then orders the code of a
# tile so that look-ups wait for each other: 21.9 us for 8,192 tokens of 8 heads on an H200, not 19.9.
PROGRAMS_PER_SM = 3
MAX_REGISTERS = 168


def launch(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: KVCacheLayout,
    key_mean: torch.Tensor | None = None,
) -> None:
    """Store keys, less the mean, and values."""
    num_tokens = key.shape[0]
    if num_tokens == 0:
        return
    config, device, constants = layout.config, pages.device, layout_constants(layout)
    head_dim, key_bits, value_bits = constants.pop("head_dim"), constants["key_bits"], constants["value_bits"]
    key_table, value_table = (lane_table(head_dim, bits, device) for bits in (key_bits, value_bits))
    key_parts = _ordered_rotation(head_dim, key_bits, key.dtype, device)
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(pages):  # type: ignore[no-untyped-call]
        warpgroup_update_kernel[(num_programs(num_tokens, layout.num_kv_heads, _num_sms(device)),)](
            key=key,
            value=value,
            key_mean=None if key_mean is None else key_mean.contiguous(),
            pages=pages,
            slot_mapping=slot_mapping,
            key_parts=key_parts,
            value_parts=_ordered_rotation(head_dim, value_bits, key.dtype, device),
            key_table=key_table.lanes,
            value_table=value_table.lanes,
            num_tokens=num_tokens,
            num_pages=pages.shape[0],
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
            page_stride=pages.stride(0),
            page_head_stride=pages.stride(1),
            slot_stride=slot_mapping.stride(0),
            key_factor=key_table.factor,
            value_factor=value_table.factor,
            channels=head_dim,
            num_parts=key_parts.shape[0],
            key_rule=config.key_scale,
            value_rule=config.value_scale,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
            **constants,
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
