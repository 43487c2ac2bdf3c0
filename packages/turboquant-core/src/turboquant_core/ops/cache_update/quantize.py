"""Triton primitives from rotated vectors to centroids and scales."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.codes import is_channel, look_up
from turboquant_core.ops.cache_update import grid_table, split_rotation

MATRIX_UNSCALE = tl.constexpr(1 / split_rotation.MATRIX_SCALE)
UNITS = tl.constexpr(float(grid_table.UNITS))
FIXED_ZERO = tl.constexpr(float(2**grid_table.FIXED_BITS + grid_table.CENTER))
FIXED_MAX = tl.constexpr(float(2 ** (grid_table.FIXED_BITS + 1) - 1))
FLOAT_ONE_UNIT = tl.constexpr(grid_table.FLOAT_ONE_UNIT)


@triton.jit
def nearest_ranks(rotated, per_length, entries, shift: tl.constexpr):
    """Ranks of the centroids nearest to rotated [rows, channels] times per_length [rows], int32; see `GridTable`.

    The minimum also turns NaN into a place inside the table.
    """
    units = (per_length * UNITS)[:, None]
    fixed = tl.minimum(rotated * units + FIXED_ZERO, FIXED_MAX).to(tl.int32, bitcast=True)
    cell = (fixed >> shift) - (FLOAT_ONE_UNIT >> shift)
    return (fixed + look_up(entries, cell)) >> shift


@triton.jit
def inverse_root(squares):
    """1 / length of a vector, or 0 where there is no direction: the sum of squares is 0, infinite or NaN."""
    usable = (squares > 0) & (squares < float("inf"))
    return tl.where(usable, tl.rsqrt(squares), 0.0)


@triton.jit
def vector_length(squares):
    """The length of a vector, of the sum of the squares of what its product with the scaled rotation is."""
    return tl.sqrt(squares) * MATRIX_UNSCALE


@triton.jit
def decoded_sums(
    rotated,
    ranks,
    centroids,
    with_inner: tl.constexpr,
    with_squares: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    """What corrected scales need of centroids c, each where asked for: the sums of c * rotated and of c * c."""
    inner = tl.zeros([rotated.shape[0]], tl.float32)
    squares = inner
    if with_inner:
        decoded = look_up(centroids, ranks)
        inner = tl.sum(decoded * rotated, axis=1)
        if with_squares:
            if octet != padded_octet:
                real = is_channel(tl.arange(0, 8 * padded_octet), octet, padded_octet)
                decoded = tl.where(real[None, :], decoded, 0.0)
            squares = tl.sum(decoded * decoded, axis=1)
    return inner, squares


@triton.jit
def corrected_scale(norm, inner, squares, rule: tl.constexpr):
    """`turboquant_core.scale.corrected_scale` of norm [rows] and the sums of unit vectors, float32 [rows]."""
    if rule == "norm":
        return norm
    if rule == "unbiased":
        corrected = norm / inner
    else:
        corrected = norm * (inner / squares)
    return tl.where(norm == 0, norm, corrected)
