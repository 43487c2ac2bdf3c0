"""Where the columns of a row are, in plain arithmetic that the kernels of raw copies share."""

import triton
import triton.language as tl


@triton.jit
def column_position(column, length, context, num_sinks: tl.constexpr, num_before: tl.constexpr, num_new: tl.constexpr):
    """The position of a column's token, and whether there is one; see `CopyColumns.positions`."""
    recent = column - num_sinks
    new = tl.maximum(context, length - num_new) + recent - num_before
    position = tl.where(recent < num_before, context - num_before + recent, new)
    position = tl.where(recent < 0, column, position)
    inside = (position < length) & (column < num_sinks + num_before + num_new)
    return position, inside & ((recent < 0) | (position >= num_sinks))


@triton.jit
def slot_of(position, real, blocks, last_block, block_size: tl.constexpr):
    """The block of a position, the slot there, and whether the pages have the block."""
    block = tl.load(blocks + position // block_size, mask=real, other=-1)
    exists = real & (block >= 0) & (block <= last_block)
    return tl.where(exists, block, 0), position % block_size, exists
