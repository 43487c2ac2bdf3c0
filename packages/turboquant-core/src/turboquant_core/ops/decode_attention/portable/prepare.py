"""Before attention: rotate the query, and lay the tiles of all rows in one line."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.overlap import wait_for_previous_kernel
from turboquant_core.ops.decode_attention.schedule import query_heads, row_tiles

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["batch", "num_tokens", "query_len", "row_capacity"])
def prepare_kernel(
    tensors,  # see `AttendTensors`: bias and cu_tiles are written
    operand,  # out, float16 [batch, num_kv_heads, num_columns, num_positions], rotated queries over their length
    factor,  # out, float32 [batch, num_kv_heads, num_columns], what scores are multiplied with, log2 units
    query,  # [num_tokens, num_heads, head_dim]
    transform,  # see `AttendTransform`
    query_token_stride,
    query_head_stride,
    batch, num_tokens, query_len, row_capacity,  # see `AttendCounts`
    rotation,  # float32 [num_positions, head_dim]; row i makes operand position i
    scale,  # of a logit
    score_scale,  # the same, times the unit of keys
    layout: tl.constexpr,
    sizes: tl.constexpr,  # see `AttendSizes`
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
    block_channels: tl.constexpr,
    block_positions: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """One program for `block_heads` query heads, counted through all tokens of all rows, and some of the positions."""
    head_dim: tl.constexpr = layout.head_dim
    num_heads: tl.constexpr = layout.num_kv_heads * sizes.group
    position = tl.program_id(1) * block_positions + tl.arange(0, block_positions)
    # What no kernel before this one writes comes while it waits for them.
    matrix = _load_rotation(rotation, position, 0, head_dim, block_channels)
    if sizes.overlap:
        wait_for_previous_kernel()
    first_program = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    if first_program:
        _write_cu_tiles(
            tensors.cu_tiles, tensors.query_start_loc, tensors.seq_lens, tensors.seq_starts, tensors.seq_ends, batch,
            num_tokens, query_len, row_capacity, sizes.tile, sizes.window, sizes.block_batch,
        )  # fmt: skip
    row, head, column, token, used = query_heads(
        tl.program_id(0) * block_heads + tl.arange(0, block_heads),
        tensors.query_start_loc, batch, num_heads, num_tokens, query_len, sizes.group,
    )  # fmt: skip
    kv_head = head // sizes.group
    place = (row.to(tl.int64) * layout.num_kv_heads + kv_head) * sizes.num_columns + column
    squares = tl.zeros([block_heads], tl.float32)
    mean_score = tl.zeros([block_heads], tl.float32)
    rotated = tl.zeros([block_heads, block_positions], tl.float32)
    for base in tl.static_range(0, block_dim, block_channels):
        channel = base + tl.arange(0, block_channels)
        real = channel < head_dim
        mask = used[:, None] & real[None, :]
        at = tl.broadcast_to(channel[None, :], [block_heads, block_channels])
        if transform.order is not None:
            at = _load_part(transform.order, row, transform.order_row_stride, kv_head, at, mask, 0, head_dim)
        source = query + token * query_token_stride + head * query_head_stride
        q = tl.load(source[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        if transform.mean is not None:  # noqa: SIM102
            if tl.program_id(1) == 0:
                mean = _load_part(transform.mean, row, transform.mean_row_stride, kv_head, at, mask, 0.0, head_dim)
                mean_score += tl.sum(q * mean, axis=1)
        if transform.scale is not None:
            q /= _load_part(transform.scale, row, transform.scale_row_stride, kv_head, at, mask, 1.0, head_dim)
        squares += tl.sum(q * q, axis=1)
        if base > 0:
            matrix = _load_rotation(rotation, position, base, head_dim, block_channels)
        # [heads, channels] x [channels, positions]
        rotated = tl.dot(q, matrix, rotated, input_precision=precision)
    # A rotation keeps lengths: over the query's length every coordinate is at most one.
    size = tl.sqrt(squares)
    # A query with NaN in it has no length, and its scores are NaN by their factor.
    size = tl.where(size == 0, 1.0, size)
    target = operand + place[:, None] * sizes.num_positions + position[None, :]
    tl.store(target, (rotated / size[:, None]).to(tl.float16), mask=used[:, None])
    if tl.program_id(1) == 0:
        tl.store(factor + place, size * (score_scale * LOG2_E), mask=used)
        if transform.mean is not None:
            tl.store(tensors.bias + place, mean_score * (scale * LOG2_E), mask=used)


@triton.jit
def _load_part(part, row, row_stride, kv_head, at, mask, other: tl.constexpr, head_dim: tl.constexpr):
    """A part of the transform of each head's KV head, at channels [heads, channels]."""
    heads = part + row.to(tl.int64) * row_stride + kv_head * head_dim
    return tl.load(heads[:, None] + at, mask=mask, other=other)


@triton.jit
def _load_rotation(rotation, position, base, head_dim: tl.constexpr, block_channels: tl.constexpr):
    """Channels base to base + block_channels - 1 of the positions, [channels, positions], with zeros past head_dim."""
    channel = base + tl.arange(0, block_channels)[:, None]
    return tl.load(rotation + channel + position[None, :] * head_dim, mask=channel < head_dim, other=0.0)


@triton.jit
def _write_cu_tiles(
    cu_tiles,
    query_start_loc,
    seq_lens,
    seq_starts,
    seq_ends,
    batch,
    num_tokens,
    query_len,
    row_capacity,
    tile: tl.constexpr,
    window: tl.constexpr,
    block_batch: tl.constexpr,
):
    row = tl.arange(0, block_batch)
    real = row < batch
    count = row_tiles(
        row, real, seq_lens, seq_starts, seq_ends, query_start_loc, query_len, num_tokens, row_capacity, tile, window
    )
    tl.store(cu_tiles, 0)
    tl.store(cu_tiles + 1 + row, tl.cumsum(count, axis=0), mask=real)
