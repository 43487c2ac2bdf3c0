"""Copy a step's tokens beside their codes, and see which copies still stand."""

from functools import partial

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.raw_copies import reference
from turboquant_core.raw_copies import CodeRange, CopyRows, RawCopies


def copy_update(
    new: tuple[torch.Tensor, torch.Tensor] | None,
    pages: torch.Tensor,
    rows: CopyRows,
    copies: RawCopies,
    layout: KVCacheLayout,
    *,
    reads_new: bool = True,
    follows_update: bool = False,
) -> CodeRange:
    """Copy the new tokens of rows, which the pages store already, and see which copies of others still stand.

    A copy stands if the slot is the one that it was made of and has the scales that it had. The newest tokens are
    read raw up to the first one, from the end, without such a copy, and the first tokens the same from the start.
    Lengths and block tables are those of now: a copy that was assigned for others does not stand.

    Args:
        new: Keys and values [num_tokens, num_kv_heads, head_dim] of the rows' query tokens, channels contiguous; None
            if another layer that shares the copies has copied them.
        pages: uint8 [num_blocks, num_kv_heads, head_bytes].
        rows: The rows and their copies.
        copies: Of the layer.
        layout: Of the pages.
        reads_new: Whether the new tokens are read from the cache too, not only what came before them.
        follows_update: Whether the operation before this one, on the same stream, wrote nothing that is read here but
            pages, as the `cache_update` of the new tokens. Part of this one is done while that one runs.

    Returns:
        What is read as codes.
    """
    update = reference.copy_update
    if pages.is_cuda:
        from turboquant_core.ops.raw_copies.launch import copy_update as launch

        update = partial(launch, early=follows_update)
    return update(new, pages, rows, copies, layout, reads_new=reads_new)
