"""What `decode_attention` refuses with TURBOQUANT_CHECK_VALUES=1."""

from collections.abc import Mapping

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._values import check_key_values, check_starts, check_stored_rows, refuse


def check_attended_values(
    arrays: Mapping[str, torch.Tensor | None],
    key_transform: KeyTransform,
    num_tokens: int,
    query_len: int,
    layout: KVCacheLayout,
    num_blocks: int,
) -> None:
    """Raise ValueError for what `decode_attention` cannot read as it is told to."""
    seq_lens, ends = arrays["seq_lens"], arrays["seq_ends"]
    start_loc, sinks = arrays["query_start_loc"], arrays["sinks"]
    assert seq_lens is not None
    check_stored_rows(arrays["block_table"], seq_lens, layout, num_blocks)
    check_starts("seq_starts", arrays["seq_starts"])
    if ends is not None:
        refuse("seq_ends", ends, ends < 0, "positions begin at 0", "Give 0 for a row of which nothing is seen")
    if start_loc is not None:
        steps = torch.nn.functional.pad(start_loc.diff(), (1, 0))
        remedy = "Give the first token of every row, and the end of the last"
        refuse(
            "query_start_loc",
            start_loc,
            (start_loc < 0) | (start_loc > num_tokens),
            f"the query has {num_tokens} tokens",
            remedy,
        )
        refuse(
            "query_start_loc",
            start_loc,
            (steps < 0) | (steps > query_len),
            f"it is not 0 to max_query_len = {query_len} after the one before it",
            remedy,
        )
    if sinks is not None:
        wrong = sinks.isnan() | (sinks == torch.inf)
        refuse("sinks", sinks, wrong, "the output of its head would be NaN", "Give minus infinity for no sink")
    check_key_values(key_transform)
