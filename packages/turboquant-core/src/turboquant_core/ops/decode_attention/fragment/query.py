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
def _count(groups, group):
    """How many entries one of the groups has."""
    return len(groups[group])


@gluon.constexpr_function
def _around_bits(columns, head_dim, swaps, group, i):
    """[columns, head_dim] with dimensions of their own for the two bits of a channel that a swap is of."""
    low, high = sorted(swaps[group][i])
    return [columns, head_dim >> (high + 1), 2, 1 << (high - low - 1), 2, 1 << low]


@gluon.jit
def load_query(
    query, token_stride, head_stride, query_start_loc, row, head, first_column, row_len, num_tokens, query_len,
    channel, group: gl.constexpr, columns: gl.constexpr,
):  # fmt: skip
    """Queries of the columns first_column to first_column + columns - 1 of a row and KV head, at channels [head_dim].

    [columns, head_dim].
    """
    layout: gl.constexpr = vector_layout(columns, channel.shape[0])
    column = first_column + gl.arange(0, columns, gl.SliceLayout(1, layout))
    first_token = row * query_len
    if query_start_loc is not None:
        first_token = clamped(gl.load(query_start_loc + row), 0, num_tokens)
    token = (first_token + column // group).to(gl.int64)
    at = query + token * token_stride + (head * group + column % group) * head_stride
    return gl.load(at[:, None] + channel[None, :], mask=(column < row_len * group)[:, None], other=0.0)


@gluon.jit
def load_part(part, row, row_stride, head, head_dim: gl.constexpr, channel):
    """A part of the transform of a row and head at channels [head_dim]."""
    return gl.load(part + row.to(gl.int64) * row_stride + head * head_dim + channel)


@gluon.jit
def query_operand(
    query,
    mean,
    key_scale,
    negative,
    scale,
    score_scale,
    rounds: gl.constexpr,
    swaps: gl.constexpr,
    key_offsets: gl.constexpr,
):
    """What products with keys take of queries [columns, head_dim], before they are divided by the scale of keys.

    For each group of channels, of which `swaps` and `key_offsets` have one entry each, the operand, int8 [positions,
    2 * columns], in which a query has two neighbours, the high and the low part of its coordinates; and what products
    lack, int32 [2 * columns]. What scores are multiplied with, and the score of the key mean, float32 [columns], both
    in log2 units.
    """
    columns: gl.constexpr = query.shape[0]
    groups: gl.constexpr = len(swaps)
    group_dim: gl.constexpr = query.shape[1] // groups
    by_head: gl.constexpr = gl.SliceLayout(0, head_layout(columns))
    q = query.to(gl.float32)
    bias = gl.zeros([columns], gl.float32, gl.SliceLayout(1, q.type.layout))
    if mean is not None:
        bias = gl.sum(q * mean[None, :], axis=1) * (scale * LOG2_E)
    if key_scale is not None:
        q /= key_scale[None, :]
    size = gl.sqrt(gl.sum(q * q, axis=1))
    # A query with NaN in it has no length, and its scores are NaN by their factor.
    size = gl.where(size == 0, 1.0, size)
    # A rotation keeps lengths: over the query's length every coordinate is at most one.
    growth: gl.constexpr = group_dim ** (rounds // 2)
    x = rotated(q, negative, rounds, groups) * (STEPS / growth / size)[:, None]
    operands = ()
    lackings = ()
    if groups == 1:
        operand, lacking = _parts(x, swaps, key_offsets, 0)
        operands = operands + (operand,)
        lackings = lackings + (lacking,)
    else:
        halves = gl.permute(gl.reshape(x, [columns, 2, group_dim]), [0, 2, 1])
        first, second = gl.split(
            gl.convert_layout(halves, gl.BlockedLayout([1, 4, 2], [4, 8, 1], [1, 1, 1], [2, 1, 0]))
        )
        operand, lacking = _parts(first, swaps, key_offsets, 0)
        second_operand, second_lacking = _parts(second, swaps, key_offsets, 1)
        operands = operands + (operand, second_operand)
        lackings = lackings + (lacking, second_lacking)
    return (
        operands,
        lackings,
        gl.convert_layout(size * (score_scale * LOG2_E), by_head),
        gl.convert_layout(bias, by_head),
    )


@gluon.jit
def _parts(x, swaps: gl.constexpr, key_offsets: gl.constexpr, group: gl.constexpr):
    """The operand of a group of channels, and what its products lack."""
    columns: gl.constexpr = x.shape[0]
    channels: gl.constexpr = x.shape[1]
    lacking = gl.floor(gl.sum(x, axis=1) * key_offsets[group] + 0.5).to(gl.int32)
    # Low parts lack it.
    lacking = gl.reshape(gl.join(gl.zeros_like(lacking), lacking), [2 * columns])
    # Channels change their names alone.
    for i in gl.static_range(_count(swaps, group)):
        apart = gl.reshape(x, _around_bits(columns, channels, swaps, group, i))
        x = gl.reshape(gl.permute(apart, [0, 1, 4, 3, 2, 5]), [columns, channels])
    whole = gl.floor(x + 0.5).to(gl.int32)
    high = (whole + 64) >> 7
    parts = gl.join(high.to(gl.int8), (whole - (high << 7)).to(gl.int8))
    parts = gl.reshape(gl.permute(parts, [1, 0, 2]), [channels, 2 * columns])
    return gl.convert_layout(parts, right_layout(4)), gl.convert_layout(lacking, gl.SliceLayout(0, mma_layout()))
