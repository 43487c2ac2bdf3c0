"""Launch the Triton kernel of `cache_update`."""

from functools import cache, partial
from typing import Any, NamedTuple

import torch

from turboquant_core.config import TurboQuantConfig
from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import codebook_tables
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops._page_layout import page_layout
from turboquant_core.ops.cache_update.grid_table import grid_table
from turboquant_core.ops.cache_update.split_rotation import split_halves_rotation, split_rotation
from turboquant_core.ops.cache_update.triton.kernel import update_kernel
from turboquant_core.ops.cache_update.triton.sizes import INTERPRETER, Processor, num_input_parts, update_launch


class UpdateTables(NamedTuple):
    """What the kernel reads beside the call's tensors.

    Attributes:
        key_parts: [num_parts, channels, channels], the rotation of keys, see `split_rotation`.
        value_parts: The same for values.
        key_grid: See `GridTable`; of the first half where keys are split.
        second_grid: The same for the second half.
        value_grid: The same for values.
        key_centroids: float32 [2^bits], ascending; of the first half where keys are split.
        second_centroids: The same for the second half.
        value_centroids: The same for values.
    """

    key_parts: torch.Tensor
    value_parts: torch.Tensor
    key_grid: torch.Tensor
    second_grid: torch.Tensor
    value_grid: torch.Tensor
    key_centroids: torch.Tensor
    second_centroids: torch.Tensor
    value_centroids: torch.Tensor


def plan(
    layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device, only_centres: bool
) -> "partial[None]":
    """The kernel with its grid, tables and options: what `UpdatePath.plan` gives."""
    config, compiled = layout.config, page_layout(layout)
    octet = padded_octet(config.head_dim)
    input_parts = num_input_parts(dtype, only_centres=only_centres)
    key_parts, value_parts = _rotations(config, torch.float16 if input_parts == 2 else dtype, device)
    first, second, values = config.key_format.groups[0], config.key_format.groups[-1], config.value_format.groups[0]
    sizes = update_launch(
        num_tokens,
        layout.num_kv_heads,
        8 * octet,
        len(value_parts),
        input_parts,
        _processor(device),
        one_path=(first, second) == (values, values),
    )
    groups = (first, second, values)
    grids = [grid_table(group.num_channels, group.bits, device) for group in groups]
    arguments: dict[str, Any] = {
        "layout": compiled,
        "tables": UpdateTables(
            _multipliable(key_parts),
            _multipliable(value_parts),
            *(grid.entries for grid in grids),
            *(codebook_tables(group.num_channels, group.bits, device, torch.float32).centroids for group in groups),
        ),
        "padded_octet": octet,
        **{
            f"{name}_{what}": value
            for name, grid in zip(("key", "second", "value"), grids, strict=True)
            for what, value in (("cells", len(grid.entries)), ("shift", grid.shift))
        },
        "key_rule": config.key_scale,
        "value_rule": config.value_scale,
        "num_parts": len(value_parts),
        "block_rows": sizes.block_rows,
        "block_k": sizes.block_k,
        "depth": sizes.depth,
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        **sizes.compiler_options,
    }
    return partial(update_kernel[(sizes.num_programs,)], **arguments)


def _rotations(config: TurboQuantConfig, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of the rotations of keys and of values, equally many."""
    values = split_rotation(config.head_dim, dtype, device).parts
    if not config.key_split:
        return values, values
    keys = split_halves_rotation(config.head_dim, dtype, device).parts
    num_parts = max(len(keys), len(values))
    # Parts of zeros add nothing.
    keys, values = (torch.nn.functional.pad(parts, (0, 0, 0, 0, 0, num_parts - len(parts))) for parts in (keys, values))
    return keys, values


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
