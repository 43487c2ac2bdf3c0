"""What `cache_gather` refuses with TURBOQUANT_CHECK_VALUES=1."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._values import check_starts, check_stored_rows, refuse


def check_gathered_values(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    layout: KVCacheLayout,
    num_blocks: int,
) -> None:
    """Raise ValueError for what `cache_gather` cannot read as it is told to."""
    check_stored_rows(block_table, seq_lens, layout, num_blocks)
    check_starts("starts", starts)
    if cu_seqlens is not None:
        lengths = seq_lens if starts is None else (seq_lens - starts).clamp(min=0)
        expected = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        refuse(
            "cu_seqlens",
            cu_seqlens,
            cu_seqlens != expected,
            "it is not how many tokens the rows before it have",
            "Give what cumulative_lengths gives, or None",
        )
