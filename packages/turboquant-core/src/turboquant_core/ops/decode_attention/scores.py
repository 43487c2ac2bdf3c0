"""Primitives on scores, in plain arithmetic that the Triton and the Gluon kernels share."""

import triton
import triton.language as tl


@triton.jit
def score_scale(scale):
    """The scale of keys for scores: NaN where it is infinite, for a score of minus infinity would be no weight."""
    return scale + scale * 0.0


@triton.jit
def scale_exponents(scale):
    """log2 of scales from the bits of their float32, low by less than 0.09.

    Zero counts as the smallest scale there is, 2^-48: farther below, sums of weights would overflow. Infinity and NaN
    count as the largest, 2^32: farther above, all other weights would underflow, and with them the sum.
    """
    exponent = scale.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 8388608.0) - 127.0
    return tl.minimum(tl.maximum(exponent, -48.0), 32.0)
