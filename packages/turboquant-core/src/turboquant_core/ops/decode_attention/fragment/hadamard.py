"""Gluon primitives: rotating vectors that a warp holds.

A rotation of a power of two is signs and Hadamard transforms in turn (see `turboquant_core.rotation`). A transform
takes sums and differences of channels whose numbers differ in one bit, bit after bit: within a lane, or by a shuffle.
The order of the bits does not matter: vectors may be in the order of positions (see `positions`), signs likewise.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def vector_layout(vectors, head_dim, warps=1, first=0):
    """[vectors, head_dim]: up to eight vectors and the top bits of channels over lanes, the rest in registers.

    `first` is the bit of the channel in which neighbouring registers differ. Warps hold the same.
    """
    in_lane, over_lanes = bits_in_lane(vectors, head_dim), bits_over_lanes(vectors)
    order = [first] + [bit for bit in range(in_lane) if bit != first]
    registers = [[0, 1 << bit] for bit in order] + [[8 << i, 0] for i in range(vectors.bit_length() - 4)]
    lanes = [[0, 1 << (in_lane + i)] for i in range(over_lanes)] + [[1 << i, 0] for i in range(5 - over_lanes)]
    repeated = [[0, 0]] * (warps.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, lanes, repeated, [], [vectors, head_dim])


@gluon.constexpr_function
def bits_over_lanes(vectors):
    """How many bits of a channel `vector_layout` has over lanes: the highest."""
    return 5 - min(vectors.bit_length() - 1, 3)


@gluon.constexpr_function
def bits_in_lane(vectors, head_dim):
    """How many it has in registers: the others."""
    return head_dim.bit_length() - 1 - bits_over_lanes(vectors)


@gluon.constexpr_function
def _shuffle(bit):
    return f"shfl.sync.bfly.b32 $0, $1, {1 << bit}, 31, 0xffffffff;"


@gluon.jit
def rotated(x, negative, rounds: gl.constexpr, groups: gl.constexpr = 1):
    """Vectors, float32 [vectors, head_dim] in `vector_layout`, rotated, times head_dim^(rounds / 2).

    Bit i of `negative`, int32 [head_dim], says whether a channel changes its sign before transform i. Two groups of
    channels, halves, are each rotated by themselves.
    """
    for i in gl.static_range(rounds):
        x = _transformed(_signed(x, negative, i), groups)
    return x


@gluon.jit
def unrotated(x, negative, rounds: gl.constexpr):
    """Undo `rotated`, again times head_dim^(rounds / 2)."""
    for i in gl.static_range(rounds):
        x = _signed(_transformed(x, 1), negative, rounds - 1 - i)
    return x


@gluon.jit
def _signed(x, negative, bit: gl.constexpr):
    sign = (negative << (31 - bit)) & -0x80000000
    return (x.to(gl.int32, bitcast=True) ^ sign[None, :]).to(gl.float32, bitcast=True)


@gluon.jit
def _transformed(x, groups: gl.constexpr):
    """The Hadamard transform of every vector, or of its halves: one without the top bit."""
    warps: gl.constexpr = gl.num_warps()
    vectors: gl.constexpr = x.shape[0]
    head_dim: gl.constexpr = x.shape[1]
    in_lane: gl.constexpr = bits_in_lane(vectors, head_dim)
    for bit in gl.static_range(in_lane):
        # Neighbouring registers are split: only their names change.
        x = gl.convert_layout(x, vector_layout(vectors, head_dim, warps, bit), assert_trivial=False)
        pairs = gl.reshape(x, [vectors, head_dim >> (bit + 1), 2, 1 << bit])
        first, second = gl.split(gl.permute(pairs, [0, 1, 3, 2]))
        pairs = gl.join(first + second, first - second)
        x = gl.reshape(gl.permute(pairs, [0, 1, 3, 2]), [vectors, head_dim])
    layout: gl.constexpr = vector_layout(vectors, head_dim, warps)
    x = gl.convert_layout(x, layout, assert_trivial=False)
    channel = gl.arange(0, head_dim, gl.SliceLayout(0, layout))
    for bit in gl.static_range(bits_over_lanes(vectors) - groups + 1):
        other = gl.inline_asm_elementwise(_shuffle(bit), "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)
        sign = gl.where((channel >> (in_lane + bit)) % 2 == 0, 1.0, -1.0)
        x = gl.fma(x, sign[None, :] + gl.zeros_like(x), other)
    return x
