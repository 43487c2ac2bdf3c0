"""Who works on which tile: the tiles of all rows in one line, cut into equal shares.

Row b owns the tiles cu_tiles[b] to cu_tiles[b + 1] - 1 of T. Each of W workers takes T // W neighbouring tiles, and the
first T % W workers one more. So a grid of fixed size is balanced whatever the lengths are. A worker leaves one partial
result for each row that it touches, in slot w + b: along the line either w or b grows, so no two of them share a slot,
and num_workers + batch slots suffice.

The primitives on scalars are plain arithmetic, which the Triton and the Gluon kernels share.
"""

import triton
import triton.language as tl

from turboquant_core.ops._triton.bounds import clamped, row_queries


@triton.jit
def first_position(length, query_len, start, window: tl.constexpr):
    """The first position that any query token of a row sees. `window` is 0 for none."""
    first = start
    if window > 0:
        first = tl.maximum(first, length - query_len + 1 - window)
    return first


@triton.jit
def share_start(worker, num_workers, num_tiles):
    """The first tile of a worker's share."""
    return worker * (num_tiles // num_workers) + tl.minimum(worker, num_tiles % num_workers)


@triton.jit
def row_reach(
    row, real, seq_lens, seq_starts, seq_ends, query_start_loc, query_len, num_tokens, row_capacity,
    tile: tl.constexpr, window: tl.constexpr,
):  # fmt: skip
    """Of a row: length, start and end of what may be seen, query tokens, the first position that those see, tiles.

    `row` may be a tensor of rows, of which those that are not `real` have no tiles.
    """
    length = clamped(tl.load(seq_lens + row, mask=real, other=0), 0, row_capacity)
    start = length * 0
    if seq_starts is not None:
        start = tl.maximum(tl.load(seq_starts + row, mask=real, other=0), 0)
    end = length
    if seq_ends is not None:
        end = clamped(tl.load(seq_ends + row, mask=real, other=0), 0, length)
    row_len = length * 0 + query_len
    if query_start_loc is not None:
        row_begin_token = tl.load(query_start_loc + row, mask=real, other=0)
        row_end_token = tl.load(query_start_loc + row + 1, mask=real, other=0)
        row_len = row_queries(row_begin_token, row_end_token, num_tokens, query_len)
    first = first_position(length, row_len, start, window)
    count = tl.maximum((end + tile - 1) // tile - first // tile, 0)
    # A row without query tokens has nothing to attend for.
    return length, start, end, row_len, first, tl.where(real & (row_len > 0), count, 0)


@triton.jit
def row_tiles(
    row, real, seq_lens, seq_starts, seq_ends, query_start_loc, query_len, num_tokens, row_capacity,
    tile: tl.constexpr, window: tl.constexpr,
):  # fmt: skip
    """The tiles of a row: the last of `row_reach`."""
    _, _, _, _, _, count = row_reach(
        row, real, seq_lens, seq_starts, seq_ends, query_start_loc, query_len, num_tokens, row_capacity, tile, window
    )
    return count


@triton.jit
def owner(tile, num_workers, num_tiles):
    """The worker whose share holds a tile."""
    small = num_tiles // num_workers
    longer = num_tiles % num_workers
    in_longer = longer * (small + 1)
    return tl.where(tile < in_longer, tile // (small + 1), longer + (tile - in_longer) // tl.maximum(small, 1))


@triton.jit
def query_heads(index, query_start_loc, batch, num_heads, num_tokens, query_len, group: tl.constexpr):
    """Row, head, column, token and validity of the query heads `index`, counted as if all rows had query_len tokens.

    Column c of a row and KV head is query token c // group, head c % group of the KV head.
    """
    row = index // (query_len * num_heads)
    inner = index % (query_len * num_heads) // num_heads
    head = index % num_heads
    used = row < batch
    row = tl.where(used, row, 0)
    if query_start_loc is None:
        token = row * query_len + inner
    else:
        first = clamped(tl.load(query_start_loc + row), 0, num_tokens)
        token = first + inner
        used = used & (token < clamped(tl.load(query_start_loc + row + 1), 0, num_tokens))
    return row, head, inner * group + head % group, token.to(tl.int64), used
