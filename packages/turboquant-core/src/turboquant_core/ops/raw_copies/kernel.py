"""`copy_update` as one Triton kernel."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.codes import scale_pointers
from turboquant_core.ops._triton.columns import column_position, row_of_step
from turboquant_core.ops._triton.overlap import wait_for_previous_kernel
from turboquant_core.ops.raw_copies.slots import slot_of


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
    early: tl.constexpr,  # whether all but the pages is there before the kernel before this one has finished
):
    """Two programs for a row: one sees which copies still are what the pages store, the other copies new tokens."""
    if overlap and not early:
        wait_for_previous_kernel()
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
        known = ()
        for i in tl.static_range(key_scales + 1):
            known = known + (tl.load(remembered + i, mask=both, other=0),)  # type: ignore[assignment]
        if overlap and early:
            wait_for_previous_kernel()
        unlike = tl.zeros([block_columns, block_heads], tl.int32)
        for i in tl.static_range(key_scales + 1):
            if i < key_scales:
                at = stored_keys.scales + 2 * i + offset * stored_keys.scale_stride
            else:
                at = stored_values.scales + offset * stored_values.scale_stride
            bits = tl.load(_as_bits(scale_rows + at[:, None]), mask=both, other=0)
            unlike = unlike | (bits != known[i]).to(tl.int32)
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
        if overlap and early:
            wait_for_previous_kernel()
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
