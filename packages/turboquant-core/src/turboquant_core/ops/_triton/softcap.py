"""Softcap, in plain arithmetic that Triton and Gluon share."""

import triton
import triton.language as tl


@triton.jit
def softcapped(score, cap):
    """The score bounded by cap * tanh(score / cap), without overflow."""
    x = score / cap
    decay = tl.exp2(-2.8853900817779268 * tl.abs(x))  # e^(-2|x|)
    size = (1.0 - decay) / (1.0 + decay)
    return cap * tl.where(x < 0, -size, size)
