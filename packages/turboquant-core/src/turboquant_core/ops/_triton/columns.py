"""The columns of a row, see `CopyColumns`, for the operations that find copies by them."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.bounds import clamped, row_queries
from turboquant_core.raw_copies import CopyColumns


def column_counts(columns: CopyColumns) -> dict[str, int]:
    """What kernels are compiled for, by name; see `column_position`."""
    return {"num_sinks": columns.sink_tokens, "num_before": columns.num_before, "num_new": columns.num_new}


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


@triton.jit
def column_position(column, length, context, num_sinks: tl.constexpr, num_before: tl.constexpr, num_new: tl.constexpr):
    """The position of a column's token, and whether there is one; see `CopyColumns.positions`."""
    recent = column - num_sinks
    new = tl.maximum(context, length - num_new) + recent - num_before
    position = tl.where(recent < num_before, context - num_before + recent, new)
    position = tl.where(recent < 0, column, position)
    inside = (position < length) & (column < num_sinks + num_before + num_new)
    return position, inside & ((recent < 0) | (position >= num_sinks))
