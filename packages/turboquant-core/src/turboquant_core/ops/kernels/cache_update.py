"""`cache_update` as one persistent Triton kernel."""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import codebook_tables
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops.kernels.codes import store_codes, store_scales
from turboquant_core.ops.kernels.grid_table import grid_table
from turboquant_core.ops.kernels.launch_update import INTERPRETER, Processor, update_launch
from turboquant_core.ops.kernels.quantize import corrected_scale, decoded_sums, inverse_root, nearest_codes
from turboquant_core.ops.kernels.rotate import (
    load_centred,
    load_slices,
    load_vectors,
    multiply,
    multiply_halves,
    offset_factor,
    power_for_halves,
    subtract_offset,
)
from turboquant_core.ops.kernels.split_rotation import MATRIX_SCALE, padded_octet, split_rotation

MATRIX_UNSCALE = tl.constexpr(1 / MATRIX_SCALE)


def cache_update(
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
    launch = _launch(layout, key.dtype, num_tokens, pages.device, key_mean is not None)
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(pages):
        _update_kernel[(launch.num_programs,)](
            key,
            value,
            key if key_mean is None else key_mean.contiguous(),
            pages,
            slot_mapping,
            *launch.tables,
            num_tokens,
            pages.shape[0],
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            pages.stride(0),
            pages.stride(1),
            slot_mapping.stride(0),
            **launch.constants,
        )


@dataclass(frozen=True)
class _Launch:
    """What a call is launched with beside its tensors.

    Attributes:
        num_programs: The grid.
        tables: The rotation, and grids and centroids for keys and values, in the kernel's order.
        constants: What is compiled in, by name, and options of the compiler.
    """

    num_programs: int
    tables: tuple[torch.Tensor, ...]
    constants: dict[str, Any]


# Lengths of prompts differ without end.
@lru_cache(maxsize=256)
def _launch(layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device, centred: bool) -> _Launch:
    config = layout.config
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    octet = padded_octet(config.head_dim)
    rotation = split_rotation(config.head_dim, torch.float16 if dtype == torch.float32 else dtype, device)
    launch = update_launch(
        num_tokens,
        layout.num_kv_heads,
        8 * octet,
        rotation.num_parts,
        2 if dtype == torch.float32 else 1,
        _processor(device),
        one_path=key_bits == value_bits,
    )
    key_grid = grid_table(config.head_dim, key_bits, device)
    value_grid = grid_table(config.head_dim, value_bits, device)
    tables = (
        _multipliable(rotation.parts),
        key_grid.entries,
        value_grid.entries,
        codebook_tables(config.head_dim, key_bits, device, torch.float32)[0],
        codebook_tables(config.head_dim, value_bits, device, torch.float32)[0],
    )
    constants = {
        "num_kv_heads": layout.num_kv_heads,
        "block_size": layout.block_size,
        "head_dim": config.head_dim,
        "padded_octet": octet,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "key_cells": len(key_grid.entries),
        "key_shift": key_grid.shift,
        "value_cells": len(value_grid.entries),
        "value_shift": value_grid.shift,
        "key_rule": config.key_scale,
        "value_rule": config.value_scale,
        "key_codes": layout.key_codes.offset,
        "value_codes": layout.value_codes.offset,
        "key_code_stride": layout.key_codes.slot_stride,
        "value_code_stride": layout.value_codes.slot_stride,
        "key_scales": layout.key_scales.offset,
        "value_scales": layout.value_scales.offset,
        "scale_stride": layout.key_scales.slot_stride,
        "centred": centred,
        "num_parts": rotation.num_parts,
        "block_rows": launch.block_rows,
        "block_k": launch.block_k,
        "depth": launch.depth,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **launch.compiler_options,
    }
    return _Launch(launch.num_programs, tables, constants)


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


@triton.jit(do_not_specialize=["num_tokens", "num_pages"])
def _update_kernel(
    key,
    value,
    key_mean,
    pages,
    slot_mapping,
    parts,
    key_grid,
    value_grid,
    key_centroids,
    value_centroids,
    num_tokens,
    num_pages,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    page_head_stride,
    slot_stride,
    num_kv_heads: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_octet: tl.constexpr,
    key_bits: tl.constexpr,
    value_bits: tl.constexpr,
    key_cells: tl.constexpr,
    key_shift: tl.constexpr,
    value_cells: tl.constexpr,
    value_shift: tl.constexpr,
    key_rule: tl.constexpr,
    value_rule: tl.constexpr,
    key_codes: tl.constexpr,
    value_codes: tl.constexpr,
    key_code_stride: tl.constexpr,
    value_code_stride: tl.constexpr,
    key_scales: tl.constexpr,
    value_scales: tl.constexpr,
    scale_stride: tl.constexpr,
    centred: tl.constexpr,
    num_parts: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,
    depth: tl.constexpr,
):
    # All tiles of a program are keys, or values, of one head: the rotated mean is a constant, and the scales of a page
    # lie together.
    channels: tl.constexpr = 8 * padded_octet
    octet: tl.constexpr = head_dim // 8
    halves: tl.constexpr = key.dtype.element_ty == tl.float32
    head = tl.program_id(0) % num_kv_heads
    is_key = tl.program_id(0) // num_kv_heads % 2 == 0
    first_block = tl.program_id(0) // (2 * num_kv_heads)
    step = tl.num_programs(0) // (2 * num_kv_heads)
    token_stride = tl.where(is_key, key_token_stride, value_token_stride)
    x = tl.where(is_key, key, value) + head.to(tl.int64) * tl.where(is_key, key_head_stride, value_head_stride)
    mean = key_mean + head * head_dim
    codes_at = pages + head.to(tl.int64) * page_head_stride + tl.where(is_key, key_codes, value_codes)
    scales_at = pages + head.to(tl.int64) * page_head_stride + tl.where(is_key, key_scales, value_scales)
    high, middle, low = parts, parts, parts
    if block_k == channels:
        high, middle, low = load_slices(parts, 0, num_parts, block_k, channels)
    offset = parts
    if centred and not halves:
        offset = offset_factor(mean, is_key, parts, head_dim, num_parts, block_k, channels)
    key_entries = tl.load(key_grid + tl.arange(0, key_cells))
    key_table = tl.load(key_centroids + tl.arange(0, 2**key_bits))
    value_entries = tl.load(value_grid + tl.arange(0, value_cells))
    value_table = tl.load(value_centroids + tl.arange(0, 2**value_bits))
    # What does not change between tiles, hoisted, would spill: it costs less to compute it again.
    for block in tl.range(first_block, tl.cdiv(num_tokens, block_rows), step, num_stages=depth, disable_licm=True):
        first_token = block * block_rows
        # Rows past the last token repeat it: loads without a mask are cheaper, and nothing of them is stored.
        last = num_tokens - 1 - first_token
        row = tl.arange(0, block_rows)
        token = tl.minimum(row, last)
        slot = tl.load(_start(slot_mapping, first_token, slot_stride) + token * slot_stride)
        # Unsigned, quotient and rest are single bit operations, and negative slots beyond all others.
        number = slot.to(tl.uint64) // block_size
        position = (slot.to(tl.uint64) % block_size).to(tl.int32)
        keep = (number < num_pages) & (row <= last)
        page = number * page_stride
        scale_rows = scales_at + page + position * scale_stride

        x_rows = _start(x, first_token, token_stride) + token * token_stride
        power = 1.0
        if halves:
            power = power_for_halves(x_rows, mean, is_key, head_dim, block_rows, block_k, centred)
        rotated = tl.zeros([block_rows, channels], tl.float32)
        if block_k == channels:
            rotated = _add_slice(
                rotated,
                x_rows,
                mean,
                is_key,
                power,
                0,
                high,
                middle,
                low,
                head_dim,
                centred,
                num_parts,
                block_k,
                halves,
            )
        else:
            for first in range(0, head_dim, block_k):
                high_k, middle_k, low_k = load_slices(parts, first, num_parts, block_k, channels)
                rotated = _add_slice(
                    rotated, x_rows, mean, is_key, power, first, high_k, middle_k, low_k, head_dim, centred, num_parts,
                    block_k, halves,
                )  # fmt: skip
        if centred and not halves:
            rotated = subtract_offset(rotated, offset, block_rows)
        # Rotating keeps the length; here, where a row is within four threads, its sums cost least.
        squares = tl.sum(rotated * rotated, axis=1)
        per_length = inverse_root(squares)
        norm = tl.sqrt(squares) * MATRIX_UNSCALE / power
        if key_bits == value_bits:
            _store_tile(
                rotated, per_length, norm, codes_at + page + position * key_code_stride, scale_rows, keep, is_key,
                key_entries, key_table, octet, padded_octet, key_bits, key_shift, key_rule, value_rule,
            )  # fmt: skip
        else:
            if is_key:
                _store_tile(
                    rotated, per_length, norm, codes_at + page + position * key_code_stride, scale_rows, keep, is_key,
                    key_entries, key_table, octet, padded_octet, key_bits, key_shift, key_rule, key_rule,
                )  # fmt: skip
            else:
                _store_tile(
                    rotated, per_length, norm, codes_at + page + position * value_code_stride, scale_rows, keep, is_key,
                    value_entries, value_table, octet, padded_octet, value_bits, value_shift, value_rule, value_rule,
                )  # fmt: skip


@triton.jit
def _start(pointer, first_token, stride):
    # Only the tile's start needs 64 bits.
    return pointer + first_token.to(tl.int64) * stride


@triton.jit
def _store_tile(
    rotated,
    per_length,
    norm,
    code_rows,
    scale_rows,
    keep,
    is_key,
    entries,
    centroids,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
    bits: tl.constexpr,
    shift: tl.constexpr,
    key_rule: tl.constexpr,
    value_rule: tl.constexpr,
):
    """Store codes and scales of rotated [rows, 8 * padded_octet]."""
    codes = nearest_codes(rotated, per_length, entries, shift)
    inner, squares = decoded_sums(
        rotated,
        codes,
        centroids,
        key_rule != "norm" or value_rule != "norm",
        key_rule == "least_squares" or value_rule == "least_squares",
        octet,
        padded_octet,
    )
    store_codes(code_rows, codes, keep, bits, rotated.shape[0], octet, padded_octet)
    inner *= per_length
    scale = corrected_scale(norm, inner, squares, key_rule)
    if key_rule != value_rule:
        scale = tl.where(is_key, scale, corrected_scale(norm, inner, squares, value_rule))
    store_scales(scale_rows, scale, keep)


@triton.jit
def _add_slice(
    rotated,
    x_rows,
    mean,
    is_key,
    power,
    first,
    high,
    middle,
    low,
    head_dim: tl.constexpr,
    centred: tl.constexpr,
    num_parts: tl.constexpr,
    block_k: tl.constexpr,
    halves: tl.constexpr,
):
    """Add what block_k input channels from `first` on contribute to the product."""
    if halves:
        x = load_centred(x_rows, mean, is_key, first, head_dim, block_k, centred)
        return multiply_halves(x * power[:, None], high, middle, low, rotated, num_parts)
    return multiply(load_vectors(x_rows, first, head_dim, block_k), high, middle, low, rotated, num_parts)
