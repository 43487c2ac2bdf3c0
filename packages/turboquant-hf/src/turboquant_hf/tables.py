"""Small tensors that the layers of a step share: made by the first that asks, found by the others."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch

_Make = TypeVar("_Make", bound=Callable[..., torch.Tensor])


def _shared(make: _Make) -> _Make:
    # A step later nobody asks for the same again.
    recent = lru_cache(maxsize=64)(make)

    @wraps(make)
    def shared(*args: Any) -> torch.Tensor:
        # torch.compile traces into what it makes; it would warn of the cache.
        return make(*args) if torch.compiler.is_compiling() else recent(*args)

    return cast(_Make, shared)


@_shared
def slot_range(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The slots start to stop - 1, int64."""
    return torch.arange(start, stop, device=device)


@_shared
def row_lengths(length: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """The length of equally long rows, int32 [num_rows]."""
    return torch.full((num_rows,), length, dtype=torch.int32, device=device)


@_shared
def block_table(num_blocks: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Block j of row b is page j * num_rows + b, int32 [num_rows, num_blocks]."""
    blocks, rows = (torch.arange(n, dtype=torch.int32, device=device) for n in (num_blocks, num_rows))
    return blocks * num_rows + rows[:, None]


@_shared
def not_a_number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN, [1]."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device)
