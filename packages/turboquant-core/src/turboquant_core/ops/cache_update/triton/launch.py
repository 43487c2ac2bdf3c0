"""Launch the Triton kernel of `cache_update`."""

from functools import cache, partial
from typing import Any, NamedTuple

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import codebook_tables
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops._page_layout import page_layout
from turboquant_core.ops.cache_update.grid_table import grid_table
from turboquant_core.ops.cache_update.split_rotation import split_rotation
from turboquant_core.ops.cache_update.triton.kernel import update_kernel
from turboquant_core.ops.cache_update.triton.sizes import INTERPRETER, Processor, update_launch


class UpdateTables(NamedTuple):
    """What the kernel reads beside the call's tensors.

    Attributes:
        parts: [num_parts, channels, channels], the rotation, see `split_rotation`.
        key_grid: See `GridTable`.
        value_grid: The same for values.
        key_centroids: float32 [2^bits], ascending.
        value_centroids: The same for values.
    """

    parts: torch.Tensor
    key_grid: torch.Tensor
    value_grid: torch.Tensor
    key_centroids: torch.Tensor
    value_centroids: torch.Tensor


def plan(layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device) -> "partial[None]":
    """The kernel with its grid, tables and options: what `UpdatePath.plan` gives."""
    config, compiled = layout.config, page_layout(layout)
    head_dim, key_bits, value_bits = config.head_dim, compiled.stored_keys.bits, compiled.stored_values.bits
    octet = padded_octet(head_dim)
    rotation = split_rotation(head_dim, torch.float16 if dtype == torch.float32 else dtype, device)
    sizes = update_launch(
        num_tokens,
        layout.num_kv_heads,
        8 * octet,
        rotation.num_parts,
        2 if dtype == torch.float32 else 1,
        _processor(device),
        one_path=key_bits == value_bits,
    )
    key_grid, value_grid = grid_table(head_dim, key_bits, device), grid_table(head_dim, value_bits, device)
    arguments: dict[str, Any] = {
        "layout": compiled,
        "tables": UpdateTables(
            _multipliable(rotation.parts),
            key_grid.entries,
            value_grid.entries,
            codebook_tables(head_dim, key_bits, device, torch.float32).centroids,
            codebook_tables(head_dim, value_bits, device, torch.float32).centroids,
        ),
        "padded_octet": octet,
        "key_cells": len(key_grid.entries),
        "key_shift": key_grid.shift,
        "value_cells": len(value_grid.entries),
        "value_shift": value_grid.shift,
        "key_rule": config.key_scale,
        "value_rule": config.value_scale,
        "num_parts": rotation.num_parts,
        "block_rows": sizes.block_rows,
        "block_k": sizes.block_k,
        "depth": sizes.depth,
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        **sizes.compiler_options,
    }
    return partial(update_kernel[(sizes.num_programs,)], **arguments)


def _multipliable(parts: torch.Tensor) -> torch.Tensor:
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    return parts.float() if interpreting() else parts


@cache
def _processor(device: torch.device) -> Processor:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Processor(properties.multi_processor_count, shared_bytes)
