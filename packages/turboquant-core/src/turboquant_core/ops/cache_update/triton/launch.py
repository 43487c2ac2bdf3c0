"""Launch the Triton kernel of `cache_update`."""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import codebook_tables
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops._triton.layout import layout_constants
from turboquant_core.ops.cache_update.grid_table import grid_table
from turboquant_core.ops.cache_update.split_rotation import split_rotation
from turboquant_core.ops.cache_update.triton.kernel import update_kernel
from turboquant_core.ops.cache_update.triton.sizes import INTERPRETER, Processor, update_launch


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
    plan = _plan(layout, key.dtype, num_tokens, pages.device, key_mean is not None)
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(pages):  # type: ignore[no-untyped-call]
        update_kernel[(plan.num_programs,)](
            key=key,
            value=value,
            key_mean=key if key_mean is None else key_mean.contiguous(),
            pages=pages,
            slot_mapping=slot_mapping,
            num_tokens=num_tokens,
            num_pages=pages.shape[0],
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
            page_stride=pages.stride(0),
            page_head_stride=pages.stride(1),
            slot_stride=slot_mapping.stride(0),
            **plan.arguments,
        )


@dataclass(frozen=True)
class _Plan:
    """What a call is launched with beside its tensors.

    Attributes:
        num_programs: The grid.
        arguments: Tables, what is compiled in, and options of the compiler, by name.
    """

    num_programs: int
    arguments: dict[str, Any]


# Lengths of prompts differ without end.
@lru_cache(maxsize=256)
def _plan(layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device, centred: bool) -> _Plan:
    config, constants = layout.config, layout_constants(layout)
    head_dim, key_bits, value_bits = config.head_dim, constants["key_bits"], constants["value_bits"]
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
    arguments = {
        **constants,
        "parts": _multipliable(rotation.parts),
        "key_grid": key_grid.entries,
        "value_grid": value_grid.entries,
        "key_centroids": codebook_tables(head_dim, key_bits, device, torch.float32)[0],
        "value_centroids": codebook_tables(head_dim, value_bits, device, torch.float32)[0],
        "padded_octet": octet,
        "key_cells": len(key_grid.entries),
        "key_shift": key_grid.shift,
        "value_cells": len(value_grid.entries),
        "value_shift": value_grid.shift,
        "key_rule": config.key_scale,
        "value_rule": config.value_scale,
        "centred": centred,
        "num_parts": rotation.num_parts,
        "block_rows": sizes.block_rows,
        "block_k": sizes.block_k,
        "depth": sizes.depth,
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        **sizes.compiler_options,
    }
    return _Plan(sizes.num_programs, arguments)


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
