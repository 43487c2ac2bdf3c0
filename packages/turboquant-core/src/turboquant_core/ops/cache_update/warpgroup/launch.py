"""Launch the warpgroup kernel of `cache_update`."""

from functools import cache, partial

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._page_layout import page_layout
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


def plan(layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device) -> "partial[None]":
    """The kernel with its grid, tables and options: what `UpdatePath.plan` gives."""
    config, compiled = layout.config, page_layout(layout)
    both = compiled.stored_keys, compiled.stored_values
    key_table, value_table = (lane_table(config.head_dim, stored.bits, device) for stored in both)
    key_parts, value_parts = (_ordered_rotation(config.head_dim, stored.bits, dtype, device) for stored in both)
    return partial(
        warpgroup_update_kernel[(num_programs(num_tokens, layout.num_kv_heads, _num_sms(device)),)],
        key_parts=key_parts,
        value_parts=value_parts,
        key_table=key_table.lanes,
        value_table=value_table.lanes,
        key_factor=key_table.factor,
        value_factor=value_table.factor,
        layout=compiled,
        num_parts=key_parts.shape[0],
        key_rule=config.key_scale,
        value_rule=config.value_scale,
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
