"""`cache_update` in Gluon: programs of one warpgroup, whose warps seldom wait for each other."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from turboquant_core._compat import barrier
from turboquant_core.ops._triton.lanes import lane_constant
from turboquant_core.ops.cache_update.quantize import corrected_scale, inverse_root
from turboquant_core.ops.cache_update.split_rotation import MATRIX_SCALE
from turboquant_core.ops.cache_update.warpgroup.primitives import (
    ROWS,
    begin_product,
    copy_matrix,
    copy_tile,
    lane_centroids,
    lane_codes,
    load_mean,
    load_slots,
    natural_order,
    offset_factors,
    operand_layout,
    product_layout,
    split_rows,
    store_codes,
    store_scales,
    sum_rows,
)

MATRIX_UNSCALE = gl.constexpr(1 / MATRIX_SCALE)


@gluon.jit(do_not_specialize=["num_tokens", "num_pages"])
def warpgroup_update_kernel(
    key,  # [num_tokens, num_kv_heads, channels]
    value,
    key_mean,  # float32 [num_kv_heads, channels], or None
    pages,
    slot_mapping,
    key_parts,  # [num_parts, channels, channels]: the rotation, with the columns of `product_columns`
    value_parts,
    key_table,  # int32 [2, 32]: see `LaneTable`
    value_table,
    num_tokens,
    num_pages,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    page_head_stride,
    slot_stride,
    key_factor,
    value_factor,
    num_kv_heads: gl.constexpr,
    block_size: gl.constexpr,
    channels: gl.constexpr,
    num_parts: gl.constexpr,
    key_bits: gl.constexpr,
    value_bits: gl.constexpr,
    key_rule: gl.constexpr,
    value_rule: gl.constexpr,
    key_codes: gl.constexpr,
    value_codes: gl.constexpr,
    key_code_stride: gl.constexpr,
    value_code_stride: gl.constexpr,
    key_scales: gl.constexpr,
    value_scales: gl.constexpr,
    key_scale_stride: gl.constexpr,
    value_scale_stride: gl.constexpr,
):
    """Each program stores every so many-th tile of ROWS tokens of the keys, or of the values, of one head."""
    head = gl.program_id(0) % num_kv_heads
    is_key = gl.program_id(0) // num_kv_heads % 2 == 0
    first_block = gl.program_id(0) // (2 * num_kv_heads)
    step = gl.num_programs(0) // (2 * num_kv_heads)
    num_blocks = gl.cdiv(num_tokens, ROWS)
    wide_head = head.to(gl.int64)
    x, token_stride, parts = key + wide_head * key_head_stride, key_token_stride, key_parts
    table, factor = key_table, key_factor
    codes_at = pages + wide_head * page_head_stride + key_codes
    scales_at = pages + wide_head * page_head_stride + key_scales
    if not is_key:
        x, token_stride, parts = value + wide_head * value_head_stride, value_token_stride, value_parts
        table, factor = value_table, value_factor
        codes_at = pages + wide_head * page_head_stride + value_codes
        scales_at = pages + wide_head * page_head_stride + value_scales

    dtype: gl.constexpr = key.dtype.element_ty
    rotation = gl.allocate_shared_memory(dtype, [num_parts, channels, channels], operand_layout(channels))
    tile = gl.allocate_shared_memory(dtype, [ROWS, channels], operand_layout(channels))
    for i in gl.static_range(num_parts):
        copy_matrix(parts + i * channels * channels, rotation.index(i), channels, channels)
    async_copy.commit_group()
    copy_tile(x, first_block, num_tokens, token_stride, tile, channels)
    async_copy.commit_group()
    entries = lane_constant(table, 0)
    centroids = lane_constant(table, 1)
    zeros = gl.zeros([ROWS, channels], gl.float32, product_layout(channels))
    if key_mean is not None:
        mean = load_mean(key_mean + head * channels, is_key, channels)
        async_copy.wait_group(1)
        ones, offset = offset_factors(mean, rotation, num_parts, channels)

    first, second = split_rows(zeros, channels)
    by_row: gl.constexpr = gl.SliceLayout(1, first.type.layout)
    slots = load_slots(slot_mapping, slot_stride, first_block, num_tokens, 0, by_row)
    second_slots = load_slots(slot_mapping, slot_stride, first_block, num_tokens, 1, by_row)
    for block in range(first_block, num_blocks, step):
        async_copy.wait_group(0)
        fence_async_shared()
        rotated = begin_product(tile, rotation, zeros, num_parts)
        if key_mean is not None:
            rotated = warpgroup_mma(ones, offset, rotated, is_async=True)
        # Slots are fetched a tile ahead, so that nothing waits for them.
        next_slots = load_slots(slot_mapping, slot_stride, block + step, num_tokens, 0, by_row)
        next_second_slots = load_slots(slot_mapping, slot_stride, block + step, num_tokens, 1, by_row)
        rotated = warpgroup_mma_wait(0, deps=(rotated,))
        # All four warps have read the tile: the next one may come while this one is stored.
        barrier()
        if block + step < num_blocks:
            copy_tile(x, block + step, num_tokens, token_stride, tile, channels)
        async_copy.commit_group()
        first, second = split_rows(rotated, channels)
        # Keys and values apart, for what only one rule needs.
        if is_key:
            _store_tile(
                first, second, slots, second_slots, codes_at, scales_at, num_pages, page_stride, factor, entries,
                centroids, block_size, channels, key_bits, key_rule, key_code_stride, key_scale_stride,
            )  # fmt: skip
        else:
            _store_tile(
                first, second, slots, second_slots, codes_at, scales_at, num_pages, page_stride, factor, entries,
                centroids, block_size, channels, value_bits, value_rule, value_code_stride, value_scale_stride,
            )  # fmt: skip
        slots = next_slots
        second_slots = next_second_slots
    async_copy.wait_group(0)


@gluon.jit
def _store_tile(
    first, second, slots, second_slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids,
    block_size: gl.constexpr, channels: gl.constexpr, bits: gl.constexpr, rule: gl.constexpr,
    code_stride: gl.constexpr, scale_stride: gl.constexpr,
):  # fmt: skip
    """Store codes and scales of the halves of a rotated tile."""
    _store_half(
        first, slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids, block_size, channels,
        bits, rule, code_stride, scale_stride,
    )  # fmt: skip
    _store_half(
        second, second_slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids, block_size,
        channels, bits, rule, code_stride, scale_stride,
    )  # fmt: skip


@gluon.jit
def _store_half(
    rotated, slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids,
    block_size: gl.constexpr, channels: gl.constexpr, bits: gl.constexpr, rule: gl.constexpr,
    code_stride: gl.constexpr, scale_stride: gl.constexpr,
):  # fmt: skip
    """Store codes and scales of rotated [HALF, channels], columns of a product."""
    finest: gl.constexpr = bits & -bits
    rotated = natural_order(rotated, channels, finest)
    # Rotating keeps the length.
    squares = sum_rows(rotated * rotated, finest)
    per_length = inverse_root(squares)
    codes = lane_codes(rotated, (per_length * factor)[:, None], entries)
    norm = gl.sqrt(squares) * MATRIX_UNSCALE
    scale = norm
    if rule != "norm":
        decoded = lane_centroids(codes, centroids)
        inner = sum_rows(decoded * rotated, finest) * per_length
        decoded_squares = inner
        if rule == "least_squares":
            decoded_squares = sum_rows(decoded * decoded, finest)
        scale = corrected_scale(norm, inner, decoded_squares, rule)

    slot = gl.convert_layout(slots, squares.type.layout, assert_trivial=True)
    # Unsigned, quotient and rest are single bit operations, and negative slots beyond all others.
    number = slot.to(gl.uint64) // block_size
    position = (slot.to(gl.uint64) % block_size).to(gl.int32)
    keep = number < num_pages
    page = number * page_stride
    store_codes(codes_at + page + position * code_stride, codes, keep, bits, channels)
    store_scales(scales_at + page + position * scale_stride, scale, keep)
