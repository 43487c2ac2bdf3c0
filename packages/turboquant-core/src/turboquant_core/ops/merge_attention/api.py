"""Attend on raw tokens, and merge that with what attention on codes gave: one kernel on a GPU."""

from functools import partial

import torch

from turboquant_core.ops.merge_attention import reference
from turboquant_core.raw_copies import CodeRange, CopyRows, RawCopies


def merge_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    follows_attention: bool = False,
) -> None:
    """Add attention on raw tokens to attention on codes, in place; one softmax over both, in float32.

    The codes take part as one more token of each query head: its logit is their log-sum-exp, its value their output.
    Without codes the output is zero and the log-sum-exp minus infinity, or the logit of a sink. Where no raw token is
    seen both stay as they are. Arguments are not checked.

    Args:
        query: [num_tokens, num_heads, head_dim], rows one after another with equally many; channels contiguous.
        out: Like `query`, of `decode_attention`; written.
        lse: float32 [num_tokens, num_heads], its log-sum-exp; written.
        keys: [rows, num_kv_heads, num_raw, head_dim], channels contiguous.
        values: The same, with the strides of keys.
        seen: bool [1 or rows, query_len, num_seen], contiguous: whether a token sees each of the first num_seen raw
            ones.
        scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
        softcap: As in `decode_attention`.
        follows_attention: Whether the operation before this one, on the same stream, is the `decode_attention` that
            gave `out` and `lse`. Most of this one is done while that one runs.
    """
    merge = reference.merge_attention
    # What torch.compile traces it fuses by itself.
    if query.is_cuda and not torch.compiler.is_compiling():
        from turboquant_core.ops.merge_attention.launch import merge_attention as launch

        merge = partial(launch, early=follows_attention)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    merge(query, out, lse, keys, values, seen, scale=scale, softcap=softcap or 0.0)


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
    follows_attention: bool = False,
) -> None:
    """The same with the raw copies of a paged cache.

    Args:
        query: [num_tokens, num_heads, head_dim], channels contiguous.
        out: Like `query`, of `decode_attention` on the codes of the range; written.
        lse: float32 [num_tokens, num_heads], its log-sum-exp; written.
        rows: The rows and their copies.
        copies: Of the layer.
        codes: What `turboquant_core.ops.raw_copies.copy_update` gave.
        scale: What logits are multiplied with.
        window: As in `decode_attention`.
        softcap: The same.
        key_mean: float32 [num_kv_heads, head_dim] that keys are taken less of, where attention on codes leaves it out.
        follows_attention: As above.
    """
    merge = reference.merge_copies
    if query.is_cuda:
        from turboquant_core.ops.merge_attention.launch import merge_copies as launch

        merge = partial(launch, early=follows_attention)
    merge(
        query, out, lse, rows, copies, codes,
        scale=scale, window=window or 0, softcap=softcap or 0.0, mean=key_mean,
    )  # fmt: skip
