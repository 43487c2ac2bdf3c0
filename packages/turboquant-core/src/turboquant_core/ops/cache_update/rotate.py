"""Triton primitives that rotate tiles of vectors to float32 accuracy with 16-bit tensor-core products.

A 16-bit input is exact as it is, and multiplies every part of the rotation (see `split_rotation`). A float32 input, or
one whose channels are scaled or ordered first, is scaled by a power of two, so that its float16 half keeps the last
bits, and multiplied in two halves.
"""

import triton
import triton.language as tl

FLOAT_BIAS = tl.constexpr(127)
FLOAT_MANTISSA_BITS = tl.constexpr(23)
# Norms scaled to [2^14, 2^15) let no float16 overflow.
TOP_EXPONENT = tl.constexpr(14)
# Over this, the offset of a mean that float16 holds is one that float16 holds.
OFFSET_UNIT = tl.constexpr(2.0**12)


@triton.jit
def load_slices(
    parts,
    order,
    used,
    first,
    head_dim: tl.constexpr,
    num_parts: tl.constexpr,
    block_k: tl.constexpr,
    channels: tl.constexpr,
):
    """Rows of every part [channels, channels] for input channels first to first + block_k - 1, the largest first.

    With an order, where it is used, vectors may keep theirs: a channel's row is that of its place. There are always
    three parts; those past num_parts repeat the first, and are not used.
    """
    channel = first + tl.arange(0, block_k)
    row = channel
    if order is not None:
        place = tl.arange(0, channels)
        channel_at = tl.load(order + place, mask=place < head_dim, other=-1).to(tl.int32)
        found = tl.sum(tl.where(channel_at[None, :] == channel[:, None], place[None, :], 0), axis=1)
        row = tl.where(used & (channel < head_dim), found, channel)
    high = _load_rows(parts, row, channels)
    middle = high
    low = high
    if num_parts > 1:
        middle = _load_rows(parts + channels * channels, row, channels)
    if num_parts > 2:
        low = _load_rows(parts + 2 * channels * channels, row, channels)
    return high, middle, low


@triton.jit
def _load_rows(matrix, row, channels: tl.constexpr):
    return tl.load(matrix + row[:, None] * channels + tl.arange(0, channels)[None, :])


@triton.jit
def _load_mean(mean, used, channel, head_dim: tl.constexpr):
    """The mean, or zeros where it is not used, at channels that may be past head_dim."""
    return tl.load(mean + channel, mask=channel < tl.where(used, head_dim, 0), other=0.0)


@triton.jit
def offset_factor(
    mean,
    used,
    parts,
    head_dim: tl.constexpr,
    num_parts: tl.constexpr,
    block_k: tl.constexpr,
    channels: tl.constexpr,
):
    """What `subtract_offset` multiplies: less the rotated mean at float32 pointer `mean`, or zeros if it is not used.

    A 16-bit input is rotated as it is, exactly, and its mean is subtracted after. As one more product that takes no
    registers: the offset is the sum of the first three rows, 16-bit, of a tile [16, channels].
    """
    rows: tl.constexpr = 16
    offset = tl.zeros([rows, channels], tl.float32)
    for first in range(0, head_dim, block_k):
        channel = first + tl.arange(0, block_k)
        rest = _load_mean(mean, used, channel, head_dim)
        high, middle, low = load_slices(parts, None, used, first, head_dim, num_parts, block_k, channels)
        for _ in tl.static_range(3):
            part = rest.to(parts.dtype.element_ty)
            rest -= part.to(tl.float32)
            offset = multiply(tl.broadcast_to(part[None, :], [rows, block_k]), high, middle, low, offset, num_parts)
    row = tl.arange(0, rows)[:, None]
    rest = -offset / OFFSET_UNIT
    factor = tl.zeros([rows, channels], parts.dtype.element_ty)
    for i in tl.static_range(3):
        part = rest.to(parts.dtype.element_ty)
        rest -= part.to(tl.float32)
        factor = tl.where(row == i, part, factor)
    return factor


@triton.jit
def subtract_offset(rotated, factor, rows: tl.constexpr):
    """Rotated [rows, channels] less the mean; see `offset_factor`."""
    ones = tl.where(tl.arange(0, 16) < 3, OFFSET_UNIT, 0.0).to(factor.dtype)
    return tl.dot(tl.broadcast_to(ones[None, :], [rows, 16]), factor, rotated)


@triton.jit
def load_vectors(x_rows, first, head_dim: tl.constexpr, block_k: tl.constexpr):
    """Channels first to first + block_k - 1 of the vectors at x_rows, [rows, block_k], with zeros past head_dim."""
    channel = first + tl.arange(0, block_k)
    if head_dim % block_k:
        return tl.load(x_rows[:, None] + channel[None, :], mask=(channel < head_dim)[None, :], other=0.0)
    return tl.load(x_rows[:, None] + channel[None, :])


@triton.jit
def load_transformed(x_rows, mean, scale, order, used, first, head_dim: tl.constexpr, block_k: tl.constexpr):
    """`load_vectors` as float32, less the mean, scaled and ordered: what of these is given, where they are used."""
    channel = first + tl.arange(0, block_k)
    if order is not None:
        in_order = tl.load(order + channel, mask=channel < head_dim, other=0).to(tl.int32)
        at = tl.where(used & (channel < head_dim), in_order, channel)
        x = tl.load(x_rows[:, None] + at[None, :], mask=(channel < head_dim)[None, :], other=0.0).to(tl.float32)
    else:
        at = channel
        x = load_vectors(x_rows, first, head_dim, block_k).to(tl.float32)
    if mean is not None:
        x = x - _load_mean(mean, used, at, head_dim)[None, :]
    if scale is not None:
        x *= tl.load(scale + at, mask=at < tl.where(used, head_dim, 0), other=1.0)[None, :]
    return x


@triton.jit
def multiply(x, high, middle, low, accumulator, num_parts: tl.constexpr):
    """Add x @ (high + middle + low) to the accumulator, small terms first for less rounding."""
    x = x.to(high.dtype)
    if num_parts > 2:
        accumulator = tl.dot(x, low, accumulator)
    if num_parts > 1:
        accumulator = tl.dot(x, middle, accumulator)
    return tl.dot(x, high, accumulator)


@triton.jit
def multiply_halves(x, high, middle, low, accumulator, num_parts: tl.constexpr):
    """`multiply` for float32 x, to about 22 bits."""
    x_high = x.to(tl.float16)
    x_low = (x - x_high.to(tl.float32)).to(tl.float16)
    accumulator = tl.dot(x_low.to(high.dtype), high, accumulator)
    return multiply(x_high, high, middle, low, accumulator, num_parts)


@triton.jit
def power_for_halves(
    x_rows,
    mean,
    scale,
    order,
    used,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    block_k: tl.constexpr,
):
    """The power of two, float32 [rows], that scales every norm into [2^14, 2^15)."""
    squares = tl.zeros([rows], tl.float32)
    for first in range(0, head_dim, block_k):
        x = load_transformed(x_rows, mean, scale, order, used, first, head_dim, block_k)
        squares += tl.sum(x * x, axis=1)
    exponent = ((squares.to(tl.int32, bitcast=True) >> FLOAT_MANTISSA_BITS) - FLOAT_BIAS) >> 1
    return ((-exponent + (TOP_EXPONENT + FLOAT_BIAS)) << FLOAT_MANTISSA_BITS).to(tl.float32, bitcast=True)
