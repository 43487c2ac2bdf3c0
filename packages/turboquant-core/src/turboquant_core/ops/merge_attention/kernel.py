"""Attention on raw tokens, merged with attention on codes, as one Triton kernel."""

import triton
import triton.language as tl

from turboquant_core.ops._bounds import MAX_TOKENS
from turboquant_core.ops._triton.columns import column_position, row_of_step
from turboquant_core.ops._triton.overlap import wait_for_previous_kernel
from turboquant_core.ops._triton.softcap import softcapped

# The lowest that is finite: a block that is hidden altogether must not give minus infinity less itself.
LOWEST = tl.constexpr(-3.0e38)
MOST_TOKENS = tl.constexpr(MAX_TOKENS)


# What a model and its cache have once and for all is compiled in; lengths and rows change from call to call.
@triton.jit(
    do_not_specialize=[
        "num_tokens", "query_len", "query_token_stride", "out_token_stride", "seen_row_stride", "entries_stride",
    ],
    do_not_specialize_on_alignment=["query", "out", "seen", "entries", "seq_lens", "query_start_loc"],
)  # fmt: skip
def merge_kernel(
    query,  # [num_tokens, num_heads, head_dim], channels contiguous
    out,  # the same, of attention on codes; written
    lse,  # float32 [num_tokens, num_heads], the same
    keys,  # raw tokens, channels contiguous
    values,  # with the strides of keys
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    raw_row_stride,  # 0 where all rows have the same
    raw_token_stride,
    raw_head_stride,
    num_tokens,
    query_len,
    scale,
    softcap,  # or None
    group: tl.constexpr,
    head_dim: tl.constexpr,
    num_columns: tl.constexpr,
    block_queries: tl.constexpr,
    block_columns: tl.constexpr,
    block_dim: tl.constexpr,
    block_channels: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    overlap: tl.constexpr,
    early: tl.constexpr,  # whether all but `out` and `lse` is there before the kernel before this one has finished
    # For `_shown`: of dense rows
    seen=None,  # bool [1 or rows, query_len, num_columns]
    seen_row_stride=0,  # 0 where all rows see the same
    # For `_copied`: of copies, see `CopyRows` and `CodeRange`
    entries=None,
    entries_stride=0,
    seq_lens=None,
    query_start_loc=None,
    starts=None,
    ends=None,
    mean=None,  # float32 [num_kv_heads, head_dim] that keys are taken less of
    window: tl.constexpr = 0,
    num_sinks: tl.constexpr = 0,
    num_before: tl.constexpr = 0,
    num_new: tl.constexpr = 0,
):
    """One program for `block_queries` query heads of a KV head of a row, counted through its query tokens.

    With `widen` products are taken in float32: for types that are not alike, and for the interpreter, which has none of
    bfloat16.
    """
    if overlap and not early:
        wait_for_previous_kernel()
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    if seen is None:
        length, context, first, row_len = row_of_step(
            row, seq_lens, query_start_loc, num_tokens, query_len, MOST_TOKENS
        )
        start = tl.load(starts + row)
        end = tl.load(ends + row)
    else:
        first = row * query_len
        row_len = query_len
    index = tl.program_id(2) * block_queries + tl.arange(0, block_queries)
    used = index < row_len * group
    token = (first + index // group).to(tl.int64)
    head = kv_head * group + index % group
    channel = tl.arange(0, block_dim)
    real_channel = (channel < head_dim)[None, :]
    source = query + (token * query_token_stride + head * query_head_stride)[:, None]
    of_row = row.to(tl.int64) * raw_row_stride + kv_head * raw_head_stride
    top = tl.full([block_queries], LOWEST, tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    result = tl.zeros([block_queries, block_dim], tl.float32)
    for base in range(0, num_columns, block_columns):
        column = base + tl.arange(0, block_columns)
        if seen is None:
            raw, there, visible = _copied(
                column, index // group, entries + row.to(tl.int64) * entries_stride, length, context, row_len, start,
                end, window, num_sinks, num_before, num_new,
            )  # fmt: skip
        else:
            raw, there, visible = _shown(
                column, index // group, used, seen + row.to(tl.int64) * seen_row_stride, num_columns
            )
        at = (of_row + raw.to(tl.int64) * raw_token_stride)[:, None]
        # On its way before it is needed.
        value = tl.load(values + at + channel[None, :], mask=there[:, None] & real_channel, other=0.0)
        if widen:
            value = value.to(tl.float32)
        logit = tl.zeros([block_queries, block_columns], tl.float32)
        for first_channel in tl.static_range(0, block_dim, block_channels):
            part = first_channel + tl.arange(0, block_channels)
            real = (part < head_dim)[None, :]
            q = tl.load(source + part[None, :], mask=used[:, None] & real, other=0.0)
            key = tl.load(keys + at + part[None, :], mask=there[:, None] & real, other=0.0)
            if widen:
                q = q.to(tl.float32)
                key = key.to(tl.float32)
            logit = tl.dot(q, tl.trans(key), logit, input_precision=precision)
            if mean is not None:
                key_mean = tl.load(mean + kv_head * head_dim + part[None, :], mask=real, other=0.0)
                logit -= tl.sum(q.to(tl.float32) * key_mean, axis=1)[:, None]
        logit *= scale
        if softcap is not None:
            logit = softcapped(logit, softcap)
        logit = tl.where(visible, logit, float("-inf"))
        highest = tl.maximum(top, tl.max(logit, axis=1))
        weight = tl.exp(logit - highest[:, None])
        rescale = tl.exp(top - highest)
        # In two parts of the values' type, which together are as good as float32.
        high = weight.to(value.dtype)
        result = tl.dot(high, value, result * rescale[:, None], input_precision=precision)
        if value.dtype != tl.float32:
            low = (weight - high.to(tl.float32)).to(value.dtype)
            result = tl.dot(low, value, result, input_precision=precision)
        total = total * rescale + tl.sum(weight, axis=1)
        top = highest
    # Where nothing is seen, what attention on codes gave stays. The weight of what is no number is none either.
    written = used & (total != 0)
    if overlap and early:
        wait_for_previous_kernel()
    place = out + (token * out_token_stride + head * out_head_stride)[:, None] + channel[None, :]
    sums = lse + token * (tl.num_programs(1) * group) + head
    logit = tl.load(sums, mask=used, other=float("-inf"))
    highest = tl.maximum(top, logit)
    weight = tl.exp(logit - highest)
    rescale = tl.exp(top - highest)
    total = total * rescale + weight
    total = tl.where(written, total, 1.0)
    codes = tl.load(place, mask=written[:, None] & real_channel, other=0.0).to(tl.float32)
    result = (result * rescale[:, None] + codes * weight[:, None]) / total[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=written[:, None] & real_channel)
    tl.store(sums, highest + tl.log(total), mask=written)


@triton.jit
def _shown(column, number, used, seen, num_columns: tl.constexpr):
    """The raw token of each column of a dense row, whether there is one, and whether the numbered tokens see it."""
    there = column < num_columns
    at = number[:, None] * num_columns + column[None, :]
    return column, there, tl.load(seen + at, mask=used[:, None] & there[None, :], other=0) != 0


@triton.jit
def _copied(
    column, number, entries, length, context, row_len, start, end,
    window: tl.constexpr, num_sinks: tl.constexpr, num_before: tl.constexpr, num_new: tl.constexpr,
):  # fmt: skip
    """The copy of each column's token, whether there is one, and whether the numbered tokens see it."""
    position, real = column_position(column, length, context, num_sinks, num_before, num_new)
    entry = tl.load(entries + column, mask=real, other=-1)
    there = real & (entry >= 0) & tl.where(column < num_sinks, position < start, position >= end)
    own = length - row_len + number
    visible = there[None, :] & (position[None, :] <= own[:, None])
    if window > 0:
        visible = visible & (position[None, :] > own[:, None] - window)
    return entry, there, visible
