"""Which sequences of a batch stay, and in which order: at least one."""

from typing import Any

import torch


def reordered(beam_idx: torch.Tensor) -> torch.Tensor:
    """The rows that `reorder_cache` takes, int64 [any].

    Raises:
        ValueError: If there are none.
    """
    return _some(beam_idx, "beam_idx", beam_idx)


def repeated(batch_size: int, repeats: Any) -> torch.Tensor:
    """The rows that `batch_repeat_interleave` takes, int64 [any].

    Raises:
        ValueError: If there are none.
    """
    return _some(torch.arange(batch_size).repeat_interleave(repeats), "repeats", repeats)


def picked(batch_size: int, indices: Any) -> torch.Tensor:
    """The rows that `batch_select_indices` takes, int64 [any], where the indices are.

    Raises:
        IndexError: If one is of no row.
        ValueError: If there are none.
    """
    device = indices.device if isinstance(indices, torch.Tensor) else None
    return _some(torch.arange(batch_size, device=device)[indices, ...].view(-1), "indices", indices)


def _some(rows: torch.Tensor, name: str, given: object) -> torch.Tensor:
    if rows.numel() == 0:
        given = given.tolist() if isinstance(given, torch.Tensor) else given
        raise ValueError(f"{name} is {given}, which keeps no sequence; keep at least one, or reset() the cache")
    return rows
