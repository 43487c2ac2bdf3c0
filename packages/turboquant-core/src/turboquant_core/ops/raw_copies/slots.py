"""Where the pages have a position."""

import triton
import triton.language as tl


@triton.jit
def slot_of(position, real, blocks, last_block, block_size: tl.constexpr):
    """The block of a position, the slot there, and whether the pages have the block."""
    block = tl.load(blocks + position // block_size, mask=real, other=-1)
    exists = real & (block >= 0) & (block <= last_block)
    return tl.where(exists, block, 0), position % block_size, exists
