"""`CopyTable.assign` as one Triton kernel of one program: later rows see what earlier ones took."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.columns import column_position
from turboquant_core.ops.raw_copies.slots import slot_of

# Ages in steps that are told apart: a copy that was not in use for longer is as good as any other such.
MOST_AGE = tl.constexpr(255)


@triton.jit(
    do_not_specialize=[
        "rows", "step", "num_copies", "last_block", "row_capacity", "table_stride", "entries_stride",
    ],
    do_not_specialize_on_alignment=["seq_lens", "query_start_loc", "block_table"],
)  # fmt: skip
def assign_kernel(
    entries,  # out, int32 [rows, num_columns]
    copy_of_slot,  # int32 [num_slots]
    slot_of_copy,  # int32 [num_copies]
    used,  # int32 [num_copies], the last step that used it
    free,  # int32 [num_copies], scratch
    seq_lens,
    query_start_loc,
    block_table,
    rows,
    step,
    num_copies,
    last_block,
    row_capacity,
    table_stride,
    entries_stride,
    block_size: tl.constexpr,
    num_sinks: tl.constexpr,
    num_before: tl.constexpr,
    num_new: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_copies: tl.constexpr,
):
    """One program for all rows, in three passes over them."""
    num_columns: tl.constexpr = num_sinks + num_before + num_new
    in_rows = tl.arange(0, block_rows)[:, None]
    column = tl.arange(0, block_columns)[None, :]
    for base in range(0, rows, block_rows):
        length, context, blocks = _rows(
            base + in_rows, rows, seq_lens, query_start_loc, block_table, row_capacity, table_stride
        )
        # A copy that new tokens get no copy over is of what their slots held before.
        begin = tl.maximum(context, num_sinks)
        end = length - num_new
        for at in range(0, tl.max(tl.max(end - begin, axis=1), axis=0), block_columns):
            position = begin + at + column
            _, _, found, held = _find(
                position, position < end, blocks, last_block, copy_of_slot, slot_of_copy, block_size
            )
            tl.store(slot_of_copy + found, found * 0 - 1, mask=held)
            tl.store(used + found, found * 0, mask=held)
        # A row has no use any more for what it has left behind.
        position = context - num_before - 1 - column
        real = (column < num_new) & (position >= num_sinks) & (base + in_rows < rows)
        _, _, found, held = _find(position, real, blocks, last_block, copy_of_slot, slot_of_copy, block_size)
        tl.store(used + found, found * 0, mask=held)
    tl.debug_barrier()
    wanted_in_all = 0
    for base in range(0, rows, block_rows):
        row = base + in_rows
        length, context, blocks = _rows(row, rows, seq_lens, query_start_loc, block_table, row_capacity, table_stride)
        position, real = column_position(column, length, context, num_sinks, num_before, num_new)
        real = real & (row < rows)
        _, exists, found, held = _find(position, real, blocks, last_block, copy_of_slot, slot_of_copy, block_size)
        tl.store(used + found, found * 0 + step, mask=held)
        wanted = exists & (position >= context) & (held == 0)
        wanted_in_all += tl.sum(tl.sum(wanted.to(tl.int32), axis=1), axis=0)
        # Below minus one: wanted.
        entry = tl.where(held, found, tl.where(wanted, -2, -1))
        tl.store(entries + row * entries_stride + column, entry, mask=(row < rows) & (column < num_columns))
    tl.debug_barrier()
    if wanted_in_all > 0:
        oldest, older = _cutoff(used, wanted_in_all, step, num_copies, block_copies)
        first = 0
        second = older
        for base in range(0, num_copies, block_copies):
            copy = base + tl.arange(0, block_copies)
            age = _age(used, copy, step, num_copies)
            is_older = (age > oldest).to(tl.int32)
            as_old = (age == oldest).to(tl.int32)
            at = tl.where(is_older > 0, first + tl.cumsum(is_older, 0) - 1, second + tl.cumsum(as_old, 0) - 1)
            tl.store(free + at, copy, mask=((is_older | as_old) > 0) & (at < wanted_in_all))
            first += tl.sum(is_older, axis=0)
            second += tl.sum(as_old, axis=0)
        tl.debug_barrier()
        taken = 0
        for base in range(0, rows, block_rows):
            row = base + in_rows
            inside = (row < rows) & (column < num_columns)
            at = entries + row * entries_stride + column
            wanted = tl.load(at, mask=inside, other=-1) == -2
            length, context, blocks = _rows(
                row, rows, seq_lens, query_start_loc, block_table, row_capacity, table_stride
            )
            position, _ = column_position(column, length, context, num_sinks, num_before, num_new)
            block, offset, _ = slot_of(position, wanted, blocks, last_block, block_size)
            slot = block * block_size + offset
            numbers = tl.reshape(wanted.to(tl.int32), [block_rows * block_columns])
            rank = tl.reshape(taken + tl.cumsum(numbers, 0) - 1, [block_rows, block_columns])
            given = wanted & (rank < second)
            copy = tl.load(free + rank, mask=given, other=-1)
            tl.store(at, copy, mask=wanted)
            tl.store(slot_of_copy + copy, slot, mask=given)
            tl.store(used + copy, copy * 0 + step, mask=given)
            tl.store(copy_of_slot + slot, copy, mask=given)
            taken += tl.sum(numbers, axis=0)


@triton.jit
def _rows(row, rows, seq_lens, query_start_loc, block_table, row_capacity, table_stride):
    """Stored tokens of rows [block_rows, 1], those before their query, and their blocks."""
    real = row < rows
    length = tl.minimum(tl.maximum(tl.load(seq_lens + row, mask=real, other=0), 0), row_capacity)
    begin = tl.load(query_start_loc + row, mask=real, other=0)
    end = tl.load(query_start_loc + row + 1, mask=real, other=0)
    return length, tl.maximum(length - tl.maximum(end - begin, 0), 0), block_table + row.to(tl.int64) * table_stride


@triton.jit
def _find(position, real, blocks, last_block, copy_of_slot, slot_of_copy, block_size: tl.constexpr):
    """The slots of positions, whether they exist, their copies, and whether they have one."""
    block, offset, exists = slot_of(position, real, blocks, last_block, block_size)
    slot = block * block_size + offset
    found = tl.load(copy_of_slot + slot, mask=exists, other=-1)
    held = exists & (found >= 0)
    held = held & (tl.load(slot_of_copy + found, mask=held, other=-1) == slot)
    return slot, exists, found, held


@triton.jit
def _age(used, copy, step, num_copies):
    """Steps since copies were in use, up to a most; 0 for those that are and for what is no copy."""
    real = copy < num_copies
    return tl.minimum(step - tl.load(used + copy, mask=real, other=step), MOST_AGE)


@triton.jit
def _cutoff(used, wanted, step, num_copies, block_copies: tl.constexpr):
    """The least age of the `wanted` copies that were not in use for longest, and how many are older."""
    counts = tl.zeros([MOST_AGE + 1], tl.int32)
    for base in range(0, num_copies, block_copies):
        copy = base + tl.arange(0, block_copies)
        counts += tl.histogram(_age(used, copy, step, num_copies), MOST_AGE + 1)
    age = tl.arange(0, MOST_AGE + 1)
    as_old = tl.sum(counts, axis=0) - tl.cumsum(counts, 0) + counts
    oldest = tl.maximum(tl.max(tl.where(as_old >= wanted, age, 0), axis=0), 1)
    return oldest, tl.sum(tl.where(age > oldest, counts, 0), axis=0)
