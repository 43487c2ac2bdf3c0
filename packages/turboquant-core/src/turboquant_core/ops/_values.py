"""The opt-in check of what tensors hold: TURBOQUANT_CHECK_VALUES=1 has every call wait for the device and look.

The variable is read once, at the first call. Without it an operation drops or clamps what does not fit, see
`turboquant_core.ops._bounds`.
"""

import os
from collections.abc import Mapping
from functools import cache

import torch

from turboquant_core.key_transform import KeyTransform
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


def check_stored_values(
    slot_mapping: torch.Tensor, key_transform: KeyTransform, layout: KVCacheLayout, num_blocks: int
) -> None:
    """Raise ValueError for what `cache_update` cannot store as it is told to."""
    num_slots = num_blocks * layout.block_size
    _refuse(
        "slot_mapping",
        slot_mapping,
        slot_mapping >= num_slots,
        f"{num_blocks} blocks of {layout.block_size} tokens have slots up to {num_slots - 1}",
        "Give a negative slot to a token that is not to be stored",
    )
    _check_finite(key_transform)


def check_gathered_values(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    layout: KVCacheLayout,
    num_blocks: int,
) -> None:
    """Raise ValueError for what `cache_gather` cannot read as it is told to."""
    _check_stored_rows(block_table, seq_lens, layout, num_blocks)
    _check_starts("starts", starts)
    if cu_seqlens is not None:
        lengths = seq_lens if starts is None else (seq_lens - starts).clamp(min=0)
        expected = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        _refuse(
            "cu_seqlens",
            cu_seqlens,
            cu_seqlens != expected,
            "it is not how many tokens the rows before it have",
            "Give what cumulative_lengths gives, or None",
        )


def check_attended_values(
    arrays: Mapping[str, torch.Tensor | None],
    key_transform: KeyTransform,
    num_tokens: int,
    query_len: int,
    layout: KVCacheLayout,
    num_blocks: int,
) -> None:
    """Raise ValueError for what `decode_attention` cannot read as it is told to."""
    seq_lens, start_loc, sinks = arrays["seq_lens"], arrays["query_start_loc"], arrays["sinks"]
    assert seq_lens is not None
    _check_stored_rows(arrays["block_table"], seq_lens, layout, num_blocks)
    _check_starts("seq_starts", arrays["seq_starts"])
    if start_loc is not None:
        steps = torch.nn.functional.pad(start_loc.diff(), (1, 0))
        remedy = "Give the first token of every row, and the end of the last"
        _refuse(
            "query_start_loc",
            start_loc,
            (start_loc < 0) | (start_loc > num_tokens),
            f"the query has {num_tokens} tokens",
            remedy,
        )
        _refuse(
            "query_start_loc",
            start_loc,
            (steps < 0) | (steps > query_len),
            f"it is not 0 to max_query_len = {query_len} after the one before it",
            remedy,
        )
    if sinks is not None:
        wrong = sinks.isnan() | (sinks == torch.inf)
        _refuse("sinks", sinks, wrong, "the output of its head would be NaN", "Give minus infinity for no sink")
    _check_finite(key_transform)


def _check_stored_rows(
    block_table: torch.Tensor | None, seq_lens: torch.Tensor, layout: KVCacheLayout, num_blocks: int
) -> None:
    max_blocks = 1 if block_table is None else block_table.shape[1]
    capacity = row_capacity(num_blocks, max_blocks, layout.block_size)
    _refuse(
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
        _refuse("block_table", block_table, wrong, limit, "Give the block that holds those tokens")


def _check_starts(name: str, starts: torch.Tensor | None) -> None:
    if starts is not None:
        _refuse(name, starts, starts < 0, "positions begin at 0", "Give 0 for a row that is seen from its first token")


def _check_finite(key_transform: KeyTransform) -> None:
    for name, x in key_transform.tensors().items():
        remedy = "Take it from finite keys, as turboquant_core.centring.mean_key does"
        _refuse(name, x, ~x.isfinite(), "it must be finite", remedy)


def _refuse(name: str, x: torch.Tensor, wrong: torch.Tensor, limit: str, remedy: str) -> None:
    """Raise ValueError that names the first entry of x where `wrong`, if there is one."""
    for index in wrong.nonzero()[:1].tolist():
        place = ", ".join(map(str, index))
        raise ValueError(f"{name}[{place}] is {x[tuple(index)].item()}; {limit}. {remedy}.")
