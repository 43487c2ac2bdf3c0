"""`cache_update` as one persistent Triton kernel."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.codes import store_codes, store_half_scales, store_halves, store_scales
from turboquant_core.ops.cache_update.quantize import (
    corrected_scale,
    decoded_sums,
    inverse_root,
    nearest_ranks,
    vector_length,
)
from turboquant_core.ops.cache_update.rotate import (
    load_slices,
    load_transformed,
    load_vectors,
    multiply,
    multiply_halves,
    offset_factor,
    power_for_halves,
    subtract_offset,
)
from turboquant_core.ops.cache_update.schedule import program_share, slot_place
from turboquant_core.ops.cache_update.triton import sizes

FEW_ROWS = tl.constexpr(sizes.FEW_ROWS)


@triton.jit(do_not_specialize=["num_tokens", "num_pages"])
def update_kernel(
    tensors,  # see `UpdateTensors`
    num_tokens, num_pages,
    tables,  # see `UpdateTables`
    layout: tl.constexpr,
    padded_octet: tl.constexpr,
    key_cells: tl.constexpr,
    key_shift: tl.constexpr,
    second_cells: tl.constexpr,
    second_shift: tl.constexpr,
    value_cells: tl.constexpr,
    value_shift: tl.constexpr,
    key_rule: tl.constexpr,
    value_rule: tl.constexpr,
    num_parts: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,
    depth: tl.constexpr,
):  # fmt: skip
    """Each program has one head's keys, or values: the rotated mean is a constant, and a page's scales lie together."""
    keys: tl.constexpr = layout.stored_keys
    values: tl.constexpr = layout.stored_values
    head_dim: tl.constexpr = layout.head_dim
    channels: tl.constexpr = 8 * padded_octet
    octet: tl.constexpr = head_dim // 8
    centred: tl.constexpr = tensors.key_mean is not None
    only_centred: tl.constexpr = tensors.key_scale is None and tensors.key_order is None
    halves: tl.constexpr = tensors.key.dtype.element_ty == tl.float32 or not only_centred
    head, is_key, first_block, step = program_share(layout.num_kv_heads)
    parts = tables.value_parts
    if keys.split:
        parts = tl.where(is_key, tables.key_parts, tables.value_parts)
    wide_head = head.to(tl.int64)
    token_stride = tl.where(is_key, tensors.key_token_stride, tensors.value_token_stride)
    x = tl.where(is_key, tensors.key, tensors.value)
    x += wide_head * tl.where(is_key, tensors.key_head_stride, tensors.value_head_stride)
    mean = None
    if centred:
        mean = tensors.key_mean + head * head_dim
    scale = None
    if tensors.key_scale is not None:
        scale = tensors.key_scale + head * head_dim
    # A few vectors are loaded in their order. Of many it costs less to have the matrix in it.
    order = None
    matrix_order = None
    if tensors.key_order is not None:
        if block_rows == FEW_ROWS:
            order = tensors.key_order + head * head_dim
        else:
            matrix_order = tensors.key_order + head * head_dim
    head_rows = tensors.pages + wide_head * tensors.page_head_stride
    codes_at = head_rows + tl.where(is_key, keys.codes, values.codes)
    scales_at = head_rows + tl.where(is_key, keys.scales, values.scales)
    high, middle, low = parts, parts, parts
    if block_k == channels:
        high, middle, low = load_slices(parts, matrix_order, is_key, 0, head_dim, num_parts, block_k, channels)
    offset = parts
    if centred and not halves:
        offset = offset_factor(mean, is_key, parts, head_dim, num_parts, block_k, channels)
    first_bits: tl.constexpr = keys.bits + 1 if keys.split else keys.bits
    key_entries = tl.load(tables.key_grid + tl.arange(0, key_cells))
    key_table = tl.load(tables.key_centroids + tl.arange(0, 2**first_bits))
    if keys.split:
        second_entries = tl.load(tables.second_grid + tl.arange(0, second_cells))
        second_table = tl.load(tables.second_centroids + tl.arange(0, 2 ** (keys.bits - 1)))
    value_entries = tl.load(tables.value_grid + tl.arange(0, value_cells))
    value_table = tl.load(tables.value_centroids + tl.arange(0, 2**values.bits))
    # What does not change between tiles, hoisted, would spill: it costs less to compute it again.
    for block in tl.range(first_block, tl.cdiv(num_tokens, block_rows), step, num_stages=depth, disable_licm=True):
        first_token = block * block_rows
        # Rows past the last token repeat it: loads without a mask are cheaper, and nothing of them is stored.
        last = num_tokens - 1 - first_token
        row = tl.arange(0, block_rows)
        token = tl.minimum(row, last)
        slot = tl.load(_start(tensors.slot_mapping, first_token, tensors.slot_stride) + token * tensors.slot_stride)
        page, position, keep = slot_place(slot, num_pages, tensors.page_stride, layout.block_size)
        keep = keep & (row <= last)
        scale_rows = scales_at + page + position * tl.where(is_key, keys.scale_stride, values.scale_stride)

        x_rows = _start(x, first_token, token_stride) + token * token_stride
        power = 1.0
        if halves:
            power = power_for_halves(x_rows, mean, scale, order, is_key, head_dim, block_rows, block_k)
        rotated = tl.zeros([block_rows, channels], tl.float32)
        if block_k == channels:
            rotated = _add_slice(
                rotated, x_rows, mean, scale, order, is_key, power, 0, high, middle, low, head_dim, num_parts, block_k,
                halves,
            )  # fmt: skip
        else:
            for first in range(0, head_dim, block_k):
                high_k, middle_k, low_k = load_slices(
                    parts, matrix_order, is_key, first, head_dim, num_parts, block_k, channels
                )
                rotated = _add_slice(
                    rotated, x_rows, mean, scale, order, is_key, power, first, high_k, middle_k, low_k, head_dim,
                    num_parts, block_k, halves,
                )  # fmt: skip
        if centred and not halves:
            rotated = subtract_offset(rotated, offset, block_rows)
        # Rotating keeps the length; here, where a row is within four threads, its sums cost least. Before the branches
        # below: Triton 3.6 pipelines no loop in which they are the first to use a product.
        if keys.split:
            # Neighbouring columns are in one thread: they part without moving.
            first_half, second_half = tl.split(tl.reshape(rotated, [block_rows, channels // 2, 2]))
            first_squares = tl.sum(first_half * first_half, axis=1)
            second_squares = tl.sum(second_half * second_half, axis=1)
            squares = first_squares + second_squares
        else:
            squares = tl.sum(rotated * rotated, axis=1)
        code_rows = codes_at + page
        if keys.bits == values.bits and not keys.split:
            _store_tile(
                rotated, squares, power, code_rows + position * keys.code_stride, scale_rows, keep, is_key,
                key_entries, key_table, octet, padded_octet, keys.bits, key_shift, key_rule, value_rule,
            )  # fmt: skip
        else:
            if is_key:
                if keys.split:
                    _store_split_tile(
                        first_half, second_half, first_squares, second_squares, power,
                        code_rows + position * keys.code_stride, scale_rows, keep,
                        key_entries, key_table, key_shift, second_entries, second_table, second_shift,
                        octet // 2, padded_octet // 2, keys.bits, key_rule,
                    )  # fmt: skip
                else:
                    _store_tile(
                        rotated, squares, power, code_rows + position * keys.code_stride, scale_rows, keep, is_key,
                        key_entries, key_table, octet, padded_octet, keys.bits, key_shift, key_rule, key_rule,
                    )  # fmt: skip
            else:
                _store_tile(
                    rotated, squares, power, code_rows + position * values.code_stride, scale_rows, keep, is_key,
                    value_entries, value_table, octet, padded_octet, values.bits, value_shift, value_rule, value_rule,
                )  # fmt: skip


@triton.jit
def _start(pointer, first_token, stride):
    # Only the tile's start needs 64 bits.
    return pointer + first_token.to(tl.int64) * stride


@triton.jit
def _store_tile(
    rotated,
    squares,
    power,
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
    ranks, norm, inner, decoded_squares = _quantized(
        rotated, squares, power, entries, centroids, octet, padded_octet, shift, key_rule, value_rule
    )
    store_codes(code_rows, ranks, keep, bits, octet, padded_octet)
    scale = corrected_scale(norm, inner, decoded_squares, key_rule)
    if key_rule != value_rule:
        scale = tl.where(is_key, scale, corrected_scale(norm, inner, decoded_squares, value_rule))
    store_scales(scale_rows, scale, keep)


@triton.jit
def _store_split_tile(
    first, second, first_squares, second_squares, power, code_rows, scale_rows, keep,
    entries, centroids, shift: tl.constexpr, second_entries, second_centroids, second_shift: tl.constexpr,
    octet: tl.constexpr, padded_octet: tl.constexpr, bits: tl.constexpr, rule: tl.constexpr,
):  # fmt: skip
    """The same of halves [rows, 8 * padded_octet]."""
    ranks, norm, inner, squares = _quantized(
        first, first_squares, power, entries, centroids, octet, padded_octet, shift, rule, rule
    )
    second_ranks, second_norm, second_inner, second_decoded_squares = _quantized(
        second, second_squares, power, second_entries, second_centroids, octet, padded_octet, second_shift, rule, rule
    )
    store_halves(code_rows, ranks, second_ranks, keep, bits, octet, padded_octet)
    store_half_scales(
        scale_rows,
        corrected_scale(norm, inner, squares, rule),
        corrected_scale(second_norm, second_inner, second_decoded_squares, rule),
        keep,
    )


@triton.jit
def _quantized(
    rotated, squares, power, entries, centroids, octet: tl.constexpr, padded_octet: tl.constexpr, shift: tl.constexpr,
    key_rule: tl.constexpr, value_rule: tl.constexpr,
):  # fmt: skip
    """Ranks of rotated [rows, 8 * padded_octet], their length, and the sums that scales of either rule need."""
    per_length = inverse_root(squares)
    ranks = nearest_ranks(rotated, per_length, entries, shift)
    inner, decoded_squares = decoded_sums(
        rotated,
        ranks,
        centroids,
        key_rule != "norm" or value_rule != "norm",
        key_rule == "least_squares" or value_rule == "least_squares",
        octet,
        padded_octet,
    )
    return ranks, vector_length(squares) / power, inner * per_length, decoded_squares


@triton.jit
def _add_slice(
    rotated, x_rows, mean, scale, order, is_key, power, first, high, middle, low,
    head_dim: tl.constexpr, num_parts: tl.constexpr, block_k: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Add what block_k input channels from `first` on contribute to the product."""
    if halves:
        x = load_transformed(x_rows, mean, scale, order, is_key, first, head_dim, block_k)
        return multiply_halves(x * power[:, None], high, middle, low, rotated, num_parts)
    return multiply(load_vectors(x_rows, first, head_dim, block_k), high, middle, low, rotated, num_parts)
