"""Copy a step's tokens beside their codes, and attend to copies instead of codes."""

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

    Returns:
        What is read as codes.
    """
    update = reference.copy_update
    if pages.is_cuda:
        from turboquant_core.ops.raw_copies.launch import copy_update as update
    return update(new, pages, rows, copies, layout, reads_new=reads_new)


def merge_copies(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: CopyRows,
    copies: RawCopies,
    codes: CodeRange,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_mean: torch.Tensor | None = None,
) -> None:
    """Add attention on copies to attention on codes, in place; one softmax over both, in float32.

    Args:
        query: [num_tokens, num_heads, head_dim], channels contiguous.
        out: Like `query`, of `decode_attention` on the codes of the range; written.
        lse: float32 [num_tokens, num_heads], its log-sum-exp; written.
        rows: The rows and their copies.
        copies: Of the layer.
        codes: What `copy_update` gave.
        scale: What logits are multiplied with.
        window: As in `decode_attention`.
        softcap: The same.
        key_mean: float32 [num_kv_heads, head_dim] that keys are taken less of, where attention on codes leaves it out.
    """
    merge = reference.merge_copies
    if query.is_cuda:
        from turboquant_core.ops.raw_copies.launch import merge_copies as merge
    merge(
        query, out, lse, rows, copies, codes,
        scale=scale, window=window or 0, softcap=softcap or 0.0, mean=key_mean,
    )  # fmt: skip
