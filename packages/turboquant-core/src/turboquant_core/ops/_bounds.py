"""What bounds the memory that an operation reads and writes.

Values of tensors are not read back to be checked, so an operation keeps to its memory whatever they are:

- A slot outside the pages is not written.
- A block outside the pages is read as the last one.
- A length is at least 0 and at most what the row's blocks hold; a first position is at least 0.
- Offsets of query tokens lie within the query, and a row has 0 to max_query_len of them.

`turboquant_core.ops._triton.bounds` has the same for kernels.
"""

import torch

# Positions are 32-bit numbers in kernels; no row comes near.
MAX_TOKENS = 2**30


def row_capacity(num_blocks: int, max_blocks: int, block_size: int) -> int:
    """The most stored tokens of a row whose blocks are max_blocks of num_blocks, of block_size tokens each."""
    return min(max_blocks * block_size, MAX_TOKENS) if num_blocks else 0


def existing_blocks(blocks: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Block numbers, int64, with the last block for those outside 0 to num_blocks - 1."""
    exists = (blocks >= 0) & (blocks < num_blocks)
    return torch.where(exists, blocks, num_blocks - 1).long()
