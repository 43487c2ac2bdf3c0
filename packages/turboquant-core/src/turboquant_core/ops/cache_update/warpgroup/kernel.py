"""`cache_update` in Gluon: programs of one warpgroup, whose warps seldom wait for each other."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from turboquant_core._compat import barrier
from turboquant_core.ops._triton.lanes import lane_constant
from turboquant_core.ops.cache_update.quantize import corrected_scale, inverse_root, vector_length
from turboquant_core.ops.cache_update.schedule import program_share, slot_place
from turboquant_core.ops.cache_update.warpgroup.primitives import (
    ROWS,
    begin_product,
    copy_matrix,
    copy_tile,
    lane_centroids,
    lane_ranks,
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


@gluon.jit(do_not_specialize=["num_tokens", "num_pages"])
def warpgroup_update_kernel(
    tensors,  # see `UpdateTensors`
    num_tokens,
    num_pages,
    key_parts,  # [num_parts, channels, channels]: the rotation, with the columns of `product_columns`
    value_parts,
    key_table,  # int32 [2, 32]: see `LaneTable`
    value_table,
    key_factor,
    value_factor,
    layout: gl.constexpr,
    num_parts: gl.constexpr,
    key_rule: gl.constexpr,
    value_rule: gl.constexpr,
):
    """Each program has one head's keys, or values, ROWS tokens at a time."""
    keys: gl.constexpr = layout.stored_keys
    values: gl.constexpr = layout.stored_values
    channels: gl.constexpr = layout.head_dim
    head, is_key, first_block, step = program_share(layout.num_kv_heads)
    num_blocks = gl.cdiv(num_tokens, ROWS)
    wide_head = head.to(gl.int64)
    head_rows = tensors.pages + wide_head * tensors.page_head_stride
    x, token_stride = tensors.key + wide_head * tensors.key_head_stride, tensors.key_token_stride
    parts, table, factor = key_parts, key_table, key_factor
    codes_at, scales_at = head_rows + keys.codes, head_rows + keys.scales
    if not is_key:
        x, token_stride = tensors.value + wide_head * tensors.value_head_stride, tensors.value_token_stride
        parts, table, factor = value_parts, value_table, value_factor
        codes_at, scales_at = head_rows + values.codes, head_rows + values.scales

    dtype: gl.constexpr = tensors.key.dtype.element_ty
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
    if tensors.key_mean is not None:
        mean = load_mean(tensors.key_mean + head * channels, is_key, channels)
        async_copy.wait_group(1)
        ones, offset = offset_factors(mean, rotation, num_parts, channels)

    first, second = split_rows(zeros, channels)
    by_row: gl.constexpr = gl.SliceLayout(1, first.type.layout)
    slots = load_slots(tensors.slot_mapping, tensors.slot_stride, first_block, num_tokens, 0, by_row)
    second_slots = load_slots(tensors.slot_mapping, tensors.slot_stride, first_block, num_tokens, 1, by_row)
    for block in range(first_block, num_blocks, step):
        async_copy.wait_group(0)
        fence_async_shared()
        rotated = begin_product(tile, rotation, zeros, num_parts)
        if tensors.key_mean is not None:
            rotated = warpgroup_mma(ones, offset, rotated, is_async=True)
        # Slots are fetched a tile ahead, so that nothing waits for them.
        next_slots = load_slots(tensors.slot_mapping, tensors.slot_stride, block + step, num_tokens, 0, by_row)
        next_second_slots = load_slots(tensors.slot_mapping, tensors.slot_stride, block + step, num_tokens, 1, by_row)
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
                first, second, slots, second_slots, codes_at, scales_at, num_pages, tensors.page_stride, factor,
                entries, centroids, layout.block_size, channels, keys, key_rule,
            )  # fmt: skip
        else:
            _store_tile(
                first, second, slots, second_slots, codes_at, scales_at, num_pages, tensors.page_stride, factor,
                entries, centroids, layout.block_size, channels, values, value_rule,
            )  # fmt: skip
        slots = next_slots
        second_slots = next_second_slots
    async_copy.wait_group(0)


@gluon.jit
def _store_tile(
    first, second, slots, second_slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids,
    block_size: gl.constexpr, channels: gl.constexpr, stored: gl.constexpr, rule: gl.constexpr,
):  # fmt: skip
    """Store codes and scales of the halves of a rotated tile."""
    _store_half(
        first, slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids, block_size, channels,
        stored, rule,
    )  # fmt: skip
    _store_half(
        second, second_slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids, block_size,
        channels, stored, rule,
    )  # fmt: skip


@gluon.jit
def _store_half(
    rotated, slots, codes_at, scales_at, num_pages, page_stride, factor, entries, centroids,
    block_size: gl.constexpr, channels: gl.constexpr, stored: gl.constexpr, rule: gl.constexpr,
):  # fmt: skip
    """Store codes and scales of rotated [HALF, channels], columns of a product."""
    finest: gl.constexpr = stored.bits & -stored.bits
    rotated = natural_order(rotated, channels, finest)
    # Rotating keeps the length.
    squares = sum_rows(rotated * rotated, finest)
    per_length = inverse_root(squares)
    ranks = lane_ranks(rotated, (per_length * factor)[:, None], entries)
    norm = vector_length(squares)
    scale = norm
    if rule != "norm":
        decoded = lane_centroids(ranks, centroids)
        inner = sum_rows(decoded * rotated, finest) * per_length
        decoded_squares = inner
        if rule == "least_squares":
            decoded_squares = sum_rows(decoded * decoded, finest)
        scale = corrected_scale(norm, inner, decoded_squares, rule)

    slot = gl.convert_layout(slots, squares.type.layout, assert_trivial=True)
    page, position, keep = slot_place(slot, num_pages, page_stride, block_size)
    store_codes(codes_at + page + position * stored.code_stride, ranks, keep, stored.bits, channels)
    store_scales(scales_at + page + position * stored.scale_stride, scale, keep)
