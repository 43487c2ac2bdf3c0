"""Gluon primitives: a row's query as the operand of products with keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_core.ops._triton.bounds import clamped
from turboquant_core.ops.decode_attention.fragment.hadamard import rotated, vector_layout
from turboquant_core.ops.decode_attention.fragment.operands import head_layout, mma_layout, right_layout

LOG2_E = gl.constexpr(1.4426950408889634)
# Of a coordinate at the length of the query: high parts are at most 127, low parts at most 64.
STEPS = gl.constexpr(127 * 128)


@gluon.constexpr_function
def _around_bits(columns, head_dim, bits):
    """[columns, head_dim] with dimensions of their own for two bits of a channel."""
    low, high = sorted(bits)
    return [columns, head_dim >> (high + 1), 2, 1 << (high - low - 1), 2, 1 << low]


@gluon.jit
def load_query(
    query, token_stride, head_stride, query_start_loc, row, head, first_column, row_len, num_tokens, query_len,
    head_dim: gl.constexpr, group: gl.constexpr, columns: gl.constexpr,
):  # fmt: skip
    """Queries of the columns first_column to first_column + columns - 1 of a row and KV head, [columns, head_dim]."""
    layout: gl.constexpr = vector_layout(columns, head_dim)
    column = first_column + gl.arange(0, columns, gl.SliceLayout(1, layout))
    channel = gl.arange(0, head_dim, gl.SliceLayout(0, layout))
    first_token = row * query_len
    if query_start_loc is not None:
        first_token = clamped(gl.load(query_start_loc + row), 0, num_tokens)
    token = (first_token + column // group).to(gl.int64)
    at = query + token * token_stride + (head * group + column % group) * head_stride
    return gl.load(at[:, None] + channel[None, :], mask=(column < row_len * group)[:, None], other=0.0)


@gluon.jit
def load_channels(pointer, columns: gl.constexpr, head_dim: gl.constexpr):
    """What there is of every channel, [head_dim], beside queries of `load_query`."""
    return gl.load(pointer + gl.arange(0, head_dim, gl.SliceLayout(0, vector_layout(columns, head_dim))))


@gluon.jit
def query_operand(
    query, mean, negative, scale, score_scale, rounds: gl.constexpr, swaps: gl.constexpr, key_offset: gl.constexpr
):
    """What products with keys take of queries [columns, head_dim].

    The operand, int8 [head_dim positions, 2 * columns]: a query has two neighbours, the high and the low part of its
    coordinates. What products lack, int32 [2 * columns]. What scores are multiplied with, and the score of the key
    mean, float32 [columns], both in log2 units.
    """
    columns: gl.constexpr = query.shape[0]
    head_dim: gl.constexpr = query.shape[1]
    by_head: gl.constexpr = gl.SliceLayout(0, head_layout(columns))
    q = query.to(gl.float32)
    size = gl.sqrt(gl.sum(q * q, axis=1))
    # A query with NaN in it has no length, and its scores are NaN by their factor.
    size = gl.where(size == 0, 1.0, size)
    bias = gl.zeros_like(size)
    if mean is not None:
        bias = gl.sum(q * mean[None, :], axis=1) * (scale * LOG2_E)
    # A rotation keeps lengths: over the query's length every coordinate is at most one.
    growth: gl.constexpr = head_dim ** (rounds // 2)
    x = rotated(q, negative, rounds) * (STEPS / growth / size)[:, None]
    lacking = gl.floor(gl.sum(x, axis=1) * key_offset + 0.5).to(gl.int32)
    # Low parts lack it.
    lacking = gl.reshape(gl.join(gl.zeros_like(lacking), lacking), [2 * columns])
    # Channels change their names alone.
    for i in gl.static_range(len(swaps)):
        apart = gl.reshape(x, _around_bits(columns, head_dim, swaps[i]))
        x = gl.reshape(gl.permute(apart, [0, 1, 4, 3, 2, 5]), [columns, head_dim])
    whole = gl.floor(x + 0.5).to(gl.int32)
    high = (whole + 64) >> 7
    parts = gl.join(high.to(gl.int8), (whole - (high << 7)).to(gl.int8))
    parts = gl.reshape(gl.permute(parts, [1, 0, 2]), [head_dim, 2 * columns])
    return (
        gl.convert_layout(parts, right_layout(4)),
        gl.convert_layout(lacking, gl.SliceLayout(0, mma_layout())),
        gl.convert_layout(size * (score_scale * LOG2_E), by_head),
        gl.convert_layout(bias, by_head),
    )
