"""Triton primitives that rotate tiles of vectors to float32 accuracy with 16-bit tensor-core products.

A 16-bit input is exact as it is, and multiplies every part of `turboquant_core.ops.kernels.split_rotation`. A float32
input is scaled by a power of two, so that its float16 half keeps the last bits, and multiplied in two halves.
"""

import triton
import triton.language as tl

FLOAT_BIAS = tl.constexpr(127)
FLOAT_MANTISSA_BITS = tl.constexpr(23)
# Norms scaled to [2^14, 2^15) let no float16 overflow.
TOP_EXPONENT = tl.constexpr(14)


@triton.jit
def load_slices(parts, first, num_parts: tl.constexpr, block_k: tl.constexpr, channels: tl.constexpr):
    """Rows first to first + block_k - 1 of every part [channels, channels], the largest first.

    There are always three; those past num_parts repeat the first, and are not used.
    """
    high = _load_slice(parts, first, block_k, channels)
    middle = high
    low = high
    if num_parts > 1:
        middle = _load_slice(parts + channels * channels, first, block_k, channels)
    if num_parts > 2:
        low = _load_slice(parts + 2 * channels * channels, first, block_k, channels)
    return high, middle, low


@triton.jit
def _load_slice(matrix, first, block_k: tl.constexpr, channels: tl.constexpr):
    row = first + tl.arange(0, block_k)
    column = tl.arange(0, channels)
    return tl.load(matrix + row[:, None] * channels + column[None, :])


@triton.jit
def rotate_mean(mean, parts, head_dim: tl.constexpr, num_parts: tl.constexpr, channels: tl.constexpr):
    """The mean at float32 pointer `mean` times the scaled matrix, float32 [channels]."""
    block_k: tl.constexpr = 16
    total = tl.zeros([channels], tl.float32)
    for first in range(0, head_dim, block_k):
        channel = first + tl.arange(0, block_k)
        x = tl.load(mean + channel, mask=channel < head_dim, other=0.0)
        high, middle, low = load_slices(parts, first, num_parts, block_k, channels)
        matrix = high.to(tl.float32)
        if num_parts > 1:
            matrix += middle.to(tl.float32)
        if num_parts > 2:
            matrix += low.to(tl.float32)
        total += tl.sum(x[:, None] * matrix, axis=0)
    return total


@triton.jit
def load_vectors(x_rows, first, head_dim: tl.constexpr, block_k: tl.constexpr):
    """Channels first to first + block_k - 1 of the vectors at x_rows, [rows, block_k], with zeros past head_dim."""
    channel = first + tl.arange(0, block_k)
    if head_dim % block_k:
        return tl.load(x_rows[:, None] + channel[None, :], mask=(channel < head_dim)[None, :], other=0.0)
    return tl.load(x_rows[:, None] + channel[None, :])


@triton.jit
def load_centred(x_rows, mean, first, head_dim: tl.constexpr, block_k: tl.constexpr, centred: tl.constexpr):
    """`load_vectors` of float32 less the mean, where there is one."""
    x = load_vectors(x_rows, first, head_dim, block_k)
    if centred:
        channel = first + tl.arange(0, block_k)
        x = x - tl.load(mean + channel, mask=channel < head_dim, other=0.0)[None, :]
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
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    block_k: tl.constexpr,
    centred: tl.constexpr,
):
    """The power of two, float32 [rows], that scales every norm into [2^14, 2^15)."""
    squares = tl.zeros([rows], tl.float32)
    for first in range(0, head_dim, block_k):
        x = load_centred(x_rows, mean, first, head_dim, block_k, centred)
        squares += tl.sum(x * x, axis=1)
    exponent = ((squares.to(tl.int32, bitcast=True) >> FLOAT_MANTISSA_BITS) - FLOAT_BIAS) >> 1
    return ((-exponent + (TOP_EXPONENT + FLOAT_BIAS)) << FLOAT_MANTISSA_BITS).to(tl.float32, bitcast=True)
