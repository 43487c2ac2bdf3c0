"""Small index tensors that every layer of a step shares."""

from functools import lru_cache

import torch

# Layers of one step ask for the same few; a step later nobody asks again.
_RECENT = 64


@lru_cache(_RECENT)
def slot_range(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The slots start to stop - 1, int64."""
    return torch.arange(start, stop, device=device)


@lru_cache(_RECENT)
def row_lengths(length: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """The length of equally long rows, int32 [num_rows]."""
    return torch.full((num_rows,), length, dtype=torch.int32, device=device)


@lru_cache(_RECENT)
def block_table(num_blocks: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Block j of row b is page j * num_rows + b, int32 [num_rows, num_blocks]."""
    blocks, rows = (torch.arange(n, dtype=torch.int32, device=device) for n in (num_blocks, num_rows))
    return blocks * num_rows + rows[:, None]


@lru_cache(_RECENT)
def not_a_number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN, [1]."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device)
