"""The opt-in check of what tensors hold: TURBOQUANT_CHECK_VALUES=1 has every call wait for the device and look.

The variable is read once, at the first call. Without it an operation drops or clamps what does not fit, see
`turboquant_core.ops._bounds`.
"""

import os
from functools import cache

import torch

from turboquant_core.key_transform import PART_LIMITS, KeyTransform, wrong_values
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import row_capacity

VARIABLE = "TURBOQUANT_CHECK_VALUES"


def checks_values() -> bool:
    """Whether values are checked; not while a CUDA graph is captured, which nothing may wait for."""
    return _asked_for() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


# Every call of an operation asks, and reading the environment takes the host longer than all other checks.
@cache
def _asked_for() -> bool:
    return os.environ.get(VARIABLE, "0").lower() in ("1", "true", "yes", "on")


def check_stored_rows(
    block_table: torch.Tensor | None, seq_lens: torch.Tensor, layout: KVCacheLayout, num_blocks: int
) -> None:
    """Raise ValueError for a length or a block of stored rows that is not there."""
    max_blocks = 1 if block_table is None else block_table.shape[1]
    capacity = row_capacity(num_blocks, max_blocks, layout.block_size)
    refuse(
        "seq_lens",
        seq_lens,
        (seq_lens < 0) | (seq_lens > capacity),
        f"a row has 0 to {capacity} tokens in {max_blocks} blocks of {layout.block_size}",
        "Give a wider block_table, or a shorter length",
    )
    if block_table is not None:
        used = torch.arange(max_blocks, device=seq_lens.device) * layout.block_size < seq_lens[:, None]
        wrong = used & ((block_table < 0) | (block_table >= num_blocks))
        limit = f"its row reads it, and the pages are blocks 0 to {num_blocks - 1}"
        refuse("block_table", block_table, wrong, limit, "Give the block that holds those tokens")


def check_starts(name: str, starts: torch.Tensor | None) -> None:
    """Raise ValueError for a first position under 0."""
    if starts is not None:
        refuse(name, starts, starts < 0, "positions begin at 0", "Give 0 for a row that is seen from its first token")


def check_key_values(key_transform: KeyTransform) -> None:
    """Raise ValueError for a transform of keys with values that none has."""
    for name, x in key_transform.tensors().items():
        refuse(name, x, wrong_values(name, x), *PART_LIMITS[name])


def refuse(name: str, x: torch.Tensor, wrong: torch.Tensor, limit: str, remedy: str) -> None:
    """Raise ValueError that names the first entry of x where `wrong`, if there is one."""
    for index in wrong.nonzero()[:1].tolist():
        place = ", ".join(map(str, index))
        raise ValueError(f"{name}[{place}] is {x[tuple(index)].item()}; {limit}. {remedy}.")
