"""`turboquant_core.ops._bounds` for kernels: plain arithmetic in 32 bits that Triton and Gluon share."""

import triton
import triton.language as tl


@triton.jit
def existing_block(block, last_block):
    """A block number, or the last one where it is not 0 to last_block: unsigned, a negative number is a large one."""
    return tl.minimum(block.to(tl.uint32), last_block.to(tl.uint32)).to(tl.int32)


@triton.jit
def clamped(x, least, most):
    """x, at least `least` and at most `most`."""
    return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def row_queries(first, end, num_tokens, query_len):
    """The query tokens of a row from its offsets: within the query, and at most query_len."""
    return clamped(clamped(end, 0, num_tokens) - clamped(first, 0, num_tokens), 0, query_len)
