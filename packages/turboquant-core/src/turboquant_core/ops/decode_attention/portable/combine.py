"""After attention: merge a row's partial results by log-sum-exp, un-rotate, write the output."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.overlap import wait_for_previous_kernel
from turboquant_core.ops.decode_attention.schedule import owner, query_heads

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["batch", "num_tokens", "query_len", "num_workers"])
def combine_kernel(
    tensors,  # see `AttendTensors`
    ends,  # see `AttendEnds`
    out_strides,  # of tokens and of heads
    batch, num_tokens, query_len,  # see `AttendCounts`
    num_workers,
    rotation,  # float32 [num_positions, head_dim]; row i belongs to position i
    layout: tl.constexpr,
    sizes: tl.constexpr,  # see `AttendSizes`
    block_heads: tl.constexpr,
    block_slots: tl.constexpr,
    block_dim: tl.constexpr,
    block_channels: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """One program for `block_heads` query heads, counted through all tokens of all rows."""
    num_kv_heads: tl.constexpr = layout.num_kv_heads
    num_heads: tl.constexpr = num_kv_heads * sizes.group
    head_dim: tl.constexpr = layout.head_dim
    position = tl.arange(0, sizes.num_positions)
    # What no kernel before this one writes comes while it waits for them.
    matrix = _load_rotation(rotation, position, 0, head_dim, block_channels)
    if sizes.overlap:
        wait_for_previous_kernel()
    row, head, column, token, used = query_heads(
        tl.program_id(0) * block_heads + tl.arange(0, block_heads),
        tensors.query_start_loc, batch, num_heads, num_tokens, query_len, sizes.group,
    )  # fmt: skip
    kv_head = head // sizes.group
    num_tiles = tl.load(tensors.cu_tiles + batch)
    row_begin = tl.load(tensors.cu_tiles + row, mask=used, other=0)
    row_end = tl.load(tensors.cu_tiles + row + 1, mask=used, other=0)
    begin = owner(row_begin, num_workers, num_tiles)
    end = tl.where(row_end > row_begin, owner(row_end - 1, num_workers, num_tiles) + 1, begin)

    if block_heads == 1:
        top, total, merged = _merge_one_head(
            tensors.partial, tensors.stats, row, kv_head, num_kv_heads, column, begin, end,
            sizes.num_columns, sizes.num_positions, block_slots,
        )  # fmt: skip
    else:
        top, total, merged = _merge_heads(
            tensors.partial, tensors.stats, row, kv_head, num_kv_heads, column, begin, end,
            sizes.num_columns, sizes.num_positions, block_heads, block_slots,
        )  # fmt: skip

    # Scores were those of centred keys: the mean's own score shifts every logit of a head alike.
    offset = tl.zeros([block_heads], tl.float32)
    if tensors.bias is not None and not sizes.has_softcap:
        place = (row.to(tl.int64) * num_kv_heads + kv_head) * sizes.num_columns + column
        offset = tl.load(tensors.bias + place, mask=used, other=0.0)
    if ends.sinks is not None:
        sink = tl.load(ends.sinks + head, mask=used, other=0.0).to(tl.float32) / LN_2 - offset
        top, rescale, weight = _weights(top, sink)
        total = total * rescale + weight
        merged = merged * rescale[:, None]
    # No key and no sink: the output is zero and the log-sum-exp minus infinity.
    merged = tl.where(total[:, None] == 0, 0.0, merged / tl.where(total == 0, 1.0, total)[:, None])
    target = ends.out + token * out_strides[0] + head * out_strides[1]
    for base in tl.static_range(0, block_dim, block_channels):
        channel = base + tl.arange(0, block_channels)
        real = channel < head_dim
        if base > 0:
            matrix = _load_rotation(rotation, position, base, head_dim, block_channels)
        # [heads, positions] x [positions, channels]
        if block_heads == 1:
            result = tl.sum(tl.trans(merged) * matrix, axis=0)[None, :]
        else:
            result = tl.dot(merged, matrix, input_precision=precision)
        tl.store(
            target[:, None] + channel[None, :], result.to(ends.out.dtype.element_ty), mask=used[:, None] & real[None, :]
        )
    if ends.lse is not None:
        tl.store(ends.lse + token * num_heads + head, (top + tl.log2(total) + offset) * LN_2, mask=used)


@triton.jit
def _weights(first, second):
    """The larger of two exponents, and what either weighs beside it."""
    highest = tl.maximum(first, second)
    # A head without tiles, and without a sink, stays at minus infinity.
    shift = tl.where(highest > float("-inf"), highest, 0.0)
    return highest, tl.exp2(first - shift), tl.exp2(second - shift)


@triton.jit
def _load_rotation(rotation, position, base, head_dim: tl.constexpr, block_channels: tl.constexpr):
    """Channels base to base + block_channels - 1 of every position, with zeros past head_dim."""
    channel = base + tl.arange(0, block_channels)[None, :]
    return tl.load(rotation + position[:, None] * head_dim + channel, mask=channel < head_dim, other=0.0)


@triton.jit
def _load_partial(
    partial, partial_stats, slot, column, mask, num_columns: tl.constexpr, num_positions: tl.constexpr
):  # fmt: skip
    """Partial results of some slots, or of some columns: exponents, sums and [any, num_positions]."""
    position = tl.arange(0, num_positions)
    exponent = tl.load(partial_stats + slot * (2 * num_columns) + column, mask=mask, other=float("-inf"))
    amount = tl.load(partial_stats + slot * (2 * num_columns) + num_columns + column, mask=mask, other=0.0)
    at = partial + (slot * num_columns + column)[:, None] * num_positions + position[None, :]
    return exponent, amount, tl.load(at, mask=mask[:, None], other=0.0)


@triton.jit
def _merge_one_head(
    partial, partial_stats, row, kv_head, num_kv_heads, column, begin, end,
    num_columns: tl.constexpr, num_positions: tl.constexpr, block_slots: tl.constexpr,
):  # fmt: skip
    """Many partial results at a time, each a row of a tile. Heads are a dimension of size one."""
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    merged = tl.zeros([1, num_positions], tl.float32)
    for base in range(0, tl.max(end - begin), block_slots):
        worker = begin + base + tl.arange(0, block_slots)
        slot = (worker + row).to(tl.int64) * num_kv_heads + kv_head
        exponent, amount, part = _load_partial(
            partial, partial_stats, slot, column, worker < end, num_columns, num_positions
        )
        highest = tl.maximum(top, tl.max(exponent, axis=0))
        rescale = tl.exp2(top - highest)
        weight = tl.exp2(exponent - highest)
        total = total * rescale + tl.sum(weight * amount, axis=0)
        merged = merged * rescale[:, None] + tl.sum(weight[:, None] * part, axis=0)[None, :]
        top = highest
    return top, total, merged


@triton.jit
def _merge_heads(
    partial, partial_stats, row, kv_head, num_kv_heads, column, begin, end,
    num_columns: tl.constexpr, num_positions: tl.constexpr, block_heads: tl.constexpr, block_slots: tl.constexpr,
):  # fmt: skip
    """One partial result of many heads at a time, `block_slots` of them on their way together."""
    top = tl.full([block_heads], float("-inf"), tl.float32)
    total = tl.zeros([block_heads], tl.float32)
    merged = tl.zeros([block_heads, num_positions], tl.float32)
    for base in range(0, tl.max(end - begin), block_slots):
        for i in tl.static_range(block_slots):
            worker = begin + base + i
            slot = (worker + row).to(tl.int64) * num_kv_heads + kv_head
            exponent, amount, part = _load_partial(
                partial, partial_stats, slot, column, worker < end, num_columns, num_positions
            )
            top, rescale, weight = _weights(top, exponent)
            total = total * rescale + weight * amount
            merged = merged * rescale[:, None] + weight[:, None] * part
    return top, total, merged
