"""Which vectors a program stores, and where: plain arithmetic, which the Triton and the Gluon kernels share."""

import triton
import triton.language as tl


@triton.jit
def program_share(num_kv_heads: tl.constexpr):
    """A program's head, whether it stores keys, its first tile, and the step to its next one.

    Each program stores every so many-th tile of the keys, or of the values, of one head.
    """
    program = tl.program_id(0)
    pair = 2 * num_kv_heads
    return program % num_kv_heads, program // num_kv_heads % 2 == 0, program // pair, tl.num_programs(0) // pair


@triton.jit
def slot_place(slot, num_pages, page_stride, block_size: tl.constexpr):
    """Where the page of a slot begins, the slot's position in it, and whether there is such a page."""
    # Unsigned, quotient and rest are single bit operations, and negative slots beyond all others.
    number = slot.to(tl.uint64) // block_size
    position = (slot.to(tl.uint64) % block_size).to(tl.int32)
    return number * page_stride, position, number < num_pages
