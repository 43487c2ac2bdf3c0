"""`copy_update` and `merge_copies` as Triton kernels, one each."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.bounds import clamped, row_queries
from turboquant_core.ops._triton.codes import scale_pointers
from turboquant_core.ops.raw_copies.columns import column_position, slot_of

# The lowest that is finite: a block that is hidden altogether must not give minus infinity less itself.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def row_of_step(row, seq_lens, query_start_loc, num_tokens, query_len, row_capacity):
    """Of a row: its stored tokens, those before its query, its first query token, and how many there are."""
    length = clamped(tl.load(seq_lens + row), 0, row_capacity)
    if query_start_loc is None:
        first = row * query_len
        row_len = query_len
    else:
        begin = tl.load(query_start_loc + row)
        first = clamped(begin, 0, num_tokens)
        row_len = row_queries(begin, tl.load(query_start_loc + row + 1), num_tokens, query_len)
    return length, tl.maximum(length - row_len, 0), first, row_len


@triton.jit(
    do_not_specialize=["num_tokens", "query_len", "row_capacity", "last_block", "table_stride", "entries_stride"],
    do_not_specialize_on_alignment=["entries", "seq_lens", "query_start_loc", "block_table"],
)
def update_kernel(
    keys,  # [num_tokens, num_kv_heads, head_dim], channels contiguous; None where another layer copies
    values,
    pages,
    block_table,
    entries,
    seq_lens,
    query_start_loc,
    copied_keys,  # see `RawCopies`
    copied_values,
    copied_slots,
    copied_scales,
    starts,  # out, int32 [rows]
    ends,  # out, int32 [rows]
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    page_head_stride,
    table_stride,
    entries_stride,
    num_tokens,
    query_len,
    row_capacity,
    last_block,
    max_position,
    layout: tl.constexpr,
    num_sinks: tl.constexpr,
    num_before: tl.constexpr,
    num_new: tl.constexpr,
    reads_new: tl.constexpr,
    block_columns: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
    overlap: tl.constexpr,
):
    """Two programs for a row: one sees which copies still are what the pages store, the other copies new tokens."""
    if overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_heads: tl.constexpr = layout.num_kv_heads
    head_dim: tl.constexpr = layout.head_dim
    stored_keys: tl.constexpr = layout.stored_keys
    stored_values: tl.constexpr = layout.stored_values
    key_scales: tl.constexpr = 2 if stored_keys.split else 1
    row = tl.program_id(0)
    length, context, first, _ = row_of_step(row, seq_lens, query_start_loc, num_tokens, query_len, row_capacity)
    blocks = block_table + row.to(tl.int64) * table_stride
    row_entries = entries + row.to(tl.int64) * entries_stride
    if tl.program_id(1) == 0:
        column = tl.arange(0, block_columns)
        position, real = column_position(column, length, context, num_sinks, num_before, num_new)
        block, offset, exists = slot_of(position, real, blocks, last_block, layout.block_size)
        entry = tl.load(row_entries + column, mask=real, other=-1)
        held = exists & (entry >= 0)
        entry = tl.where(held, entry, 0)
        slot = block * layout.block_size + offset
        if keys is None:
            written = held & False
        else:
            written = held & (position >= context)
        same = held & (tl.load(copied_slots + entry, mask=held, other=-1) == slot)
        head = tl.arange(0, block_heads)
        both = held[:, None] & (head < num_heads)[None, :]
        scale_rows = (
            pages + (block.to(tl.int64) * page_stride)[:, None] + (head.to(tl.int64) * page_head_stride)[None, :]
        )
        remembered = copied_scales + (entry.to(tl.int64)[:, None] * num_heads + head[None, :]) * (key_scales + 1)
        unlike = tl.zeros([block_columns, block_heads], tl.int32)
        for i in tl.static_range(key_scales + 1):
            if i < key_scales:
                at = stored_keys.scales + 2 * i + offset * stored_keys.scale_stride
            else:
                at = stored_values.scales + offset * stored_values.scale_stride
            bits = tl.load(_as_bits(scale_rows + at[:, None]), mask=both, other=0)
            unlike = unlike | (bits != tl.load(remembered + i, mask=both, other=0)).to(tl.int32)
            tl.store(remembered + i, bits, mask=both & written[:, None])
        tl.store(copied_slots + entry, slot, mask=written)
        valid = written | (same & (tl.max(unlike, axis=1) == 0))
        missing = real & (valid == 0)

        start = tl.min(tl.where(missing & (column < num_sinks), column, num_sinks), axis=0)
        tl.store(starts + row, start)
        end = max_position
        if num_new > 0:
            end = context - num_before
            # First tokens from the missing one on are codes, also where the newest begin before them.
            read = tl.where(column < num_sinks, real & (column >= start), missing)
            if reads_new:
                # More new tokens than there are columns: those before the newest are codes.
                end = tl.where(length - context > num_new, length - num_new, end)
            else:
                read = read & (position < context)
            end = tl.maximum(tl.maximum(end, tl.max(tl.where(read, position + 1, 0), axis=0)), 0)
        tl.store(ends + row, end)
    elif keys is not None:
        # A row of one new token has one column of it, and its first tokens are new but once.
        if context < num_sinks:
            for index in range(0, num_sinks):
                _copy(
                    index, keys, values, row_entries, blocks, copied_keys, copied_values, length, context, first,
                    key_token_stride, key_head_stride, value_token_stride, value_head_stride, last_block,
                    layout.block_size, num_heads, head_dim, num_sinks, num_before, num_new, block_heads, block_dim,
                )  # fmt: skip
        newest = tl.minimum(length - context, num_new)
        for index in range(num_sinks + num_before, num_sinks + num_before + newest):
            _copy(
                index, keys, values, row_entries, blocks, copied_keys, copied_values, length, context, first,
                key_token_stride, key_head_stride, value_token_stride, value_head_stride, last_block,
                layout.block_size, num_heads, head_dim, num_sinks, num_before, num_new, block_heads, block_dim,
            )  # fmt: skip


@triton.jit
def _as_bits(scale_bytes):
    return scale_pointers(scale_bytes).to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def _copy(
    column, keys, values, row_entries, blocks, copied_keys, copied_values, length, context, first,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, last_block,
    block_size: tl.constexpr, num_heads: tl.constexpr, head_dim: tl.constexpr, num_sinks: tl.constexpr,
    num_before: tl.constexpr, num_new: tl.constexpr, block_heads: tl.constexpr, block_dim: tl.constexpr,
):  # fmt: skip
    """Copy the key and value of a column's token, if it is new and has a copy."""
    column = tl.zeros([1, 1], tl.int32) + column
    position, real = column_position(column, length, context, num_sinks, num_before, num_new)
    _, _, exists = slot_of(position, real, blocks, last_block, block_size)
    entry = tl.load(row_entries + column)
    head = tl.arange(0, block_heads)[:, None]
    channel = tl.arange(0, block_dim)[None, :]
    mask = exists & (entry >= 0) & (position >= context) & (head < num_heads) & (channel < head_dim)
    token = (first + position - context).to(tl.int64)
    to = (entry.to(tl.int64) * num_heads + head) * head_dim + channel
    key = tl.load(keys + token * key_token_stride + head * key_head_stride + channel, mask=mask)
    tl.store(copied_keys + to, key, mask=mask)
    value = tl.load(values + token * value_token_stride + head * value_head_stride + channel, mask=mask)
    tl.store(copied_values + to, value, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "query_len", "row_capacity", "entries_stride", "query_token_stride", "out_token_stride",
    ],
    do_not_specialize_on_alignment=["entries", "seq_lens", "query_start_loc", "query", "out"],
)  # fmt: skip
def merge_kernel(
    query,  # [num_tokens, num_heads, head_dim], channels contiguous
    out,  # the same, of attention on codes; written
    lse,  # float32 [num_tokens, num_heads], the same
    entries,
    seq_lens,
    query_start_loc,
    starts,
    ends,
    copied_keys,
    copied_values,
    mean,  # float32 [num_kv_heads, head_dim], or None
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    entries_stride,
    num_tokens,
    query_len,
    row_capacity,
    scale,
    softcap,
    has_softcap: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    num_sinks: tl.constexpr,
    num_before: tl.constexpr,
    num_new: tl.constexpr,
    block_queries: tl.constexpr,
    block_columns: tl.constexpr,
    block_dim: tl.constexpr,
    widen: tl.constexpr,
    overlap: tl.constexpr,
):
    """One program for `block_queries` query heads of a KV head of a row, counted through its query tokens.

    With `widen` products are taken in float32, for the interpreter, which has none of bfloat16.
    """
    if overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    length, context, first, row_len = row_of_step(row, seq_lens, query_start_loc, num_tokens, query_len, row_capacity)
    start = tl.load(starts + row)
    end = tl.load(ends + row)
    index = tl.program_id(2) * block_queries + tl.arange(0, block_queries)
    own = length - row_len + index // group
    used = index < row_len * group
    token = (first + index // group).to(tl.int64)
    head = kv_head * group + index % group
    channel = tl.arange(0, block_dim)
    real_channel = (channel < head_dim)[None, :]
    mask = used[:, None] & real_channel
    source = query + (token * query_token_stride + head * query_head_stride)[:, None] + channel[None, :]
    q = tl.load(source, mask=mask, other=0.0)
    if widen:
        q = q.to(tl.float32)
    shift = tl.zeros([block_queries], tl.float32)
    if mean is not None:
        key_mean = tl.load(mean + kv_head * head_dim + channel, mask=channel < head_dim, other=0.0)
        shift = tl.sum(q.to(tl.float32) * key_mean[None, :], axis=1)
    row_entries = entries + row.to(tl.int64) * entries_stride
    top = tl.full([block_queries], LOWEST, tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    result = tl.zeros([block_queries, block_dim], tl.float32)
    for base in range(0, num_sinks + num_before + num_new, block_columns):
        column = base + tl.arange(0, block_columns)
        position, real = column_position(column, length, context, num_sinks, num_before, num_new)
        entry = tl.load(row_entries + column, mask=real, other=-1)
        raw = real & (entry >= 0) & tl.where(column < num_sinks, position < start, position >= end)
        seen = raw[None, :] & (position[None, :] <= own[:, None])
        if window > 0:
            seen = seen & (position[None, :] > own[:, None] - window)
        at = ((entry.to(tl.int64) * num_kv_heads + kv_head) * head_dim)[:, None] + channel[None, :]
        key = tl.load(copied_keys + at, mask=raw[:, None] & real_channel, other=0.0)
        value = tl.load(copied_values + at, mask=raw[:, None] & real_channel, other=0.0)
        if widen:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        logit = (tl.dot(q, tl.trans(key), input_precision="ieee") - shift[:, None]) * scale
        if has_softcap:
            logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))
        logit = tl.where(seen, logit, float("-inf"))
        highest = tl.maximum(top, tl.max(logit, axis=1))
        weight = tl.exp(logit - highest[:, None])
        rescale = tl.exp(top - highest)
        # In two parts of the values' type, which together are as good as float32.
        high = weight.to(value.dtype)
        low = (weight - high.to(tl.float32)).to(value.dtype)
        result = tl.dot(high, value, result * rescale[:, None], input_precision="ieee")
        result = tl.dot(low, value, result, input_precision="ieee")
        total = total * rescale + tl.sum(weight, axis=1)
        top = highest
    place = out + (token * out_token_stride + head * out_head_stride)[:, None] + channel[None, :]
    sums = lse + token * (num_kv_heads * group) + head
    logit = tl.load(sums, mask=used, other=float("-inf"))
    highest = tl.maximum(top, logit)
    weight = tl.exp(logit - highest)
    rescale = tl.exp(top - highest)
    total = total * rescale + weight
    # Where nothing is seen, what attention on codes gave stays.
    written = used & (total > 0) & (top > LOWEST)
    total = tl.where(written, total, 1.0)
    codes = tl.load(place, mask=written[:, None] & real_channel, other=0.0).to(tl.float32)
    result = (result * rescale[:, None] + codes * weight[:, None]) / total[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=written[:, None] & real_channel)
    tl.store(sums, highest + tl.log(total), mask=written)
