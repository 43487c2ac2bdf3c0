"""Attention on raw tokens, merged with attention on codes, in plain PyTorch."""

import torch

from turboquant_core.raw_copies import CodeRange, CopyRows, RawCopies


def merge_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    softcap: float,
) -> None:
    """See `turboquant_core.ops.merge_attention`."""
    rows, num_kv_heads, _, head_dim = keys.shape
    query_len, num_seen = seen.shape[1:]
    keys, values = (x[:, :, :num_seen].float() for x in (keys, values))
    # [rows, query_len, num_kv_heads, heads of a KV head, head_dim]
    grouped = (query.float() * scale).reshape(rows, query_len, num_kv_heads, -1, head_dim)
    logits = torch.einsum("rqhgd,rhcd->rqhgc", grouped, keys)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen[:, :, None, None], -torch.inf)
    merged = torch.cat([logits, lse.view(*grouped.shape[:-1], 1)], dim=-1)
    total = merged.logsumexp(-1, keepdim=True)
    # Where nothing is seen every weight is zero.
    weights = torch.exp(merged - total).masked_fill(total.isneginf(), 0.0)
    attended = torch.einsum("rqhgc,rhcd->rqhgd", weights[..., :-1], values)
    attended = attended + weights[..., -1:] * out.view(grouped.shape)
    out.view(grouped.shape).copy_(attended)
    lse.view(total.shape).copy_(total)


def merge_copies(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: CopyRows,
    copies: RawCopies,
    codes: CodeRange,
    *,
    scale: float,
    window: int,
    softcap: float,
    mean: torch.Tensor | None,
) -> None:
    """See `turboquant_core.ops.merge_attention.merge_copies`."""
    batch = len(rows.seq_lens)
    if not batch:
        return
    token = torch.arange(len(query), dtype=torch.int32, device=query.device)
    first = rows.first_tokens
    row = torch.searchsorted(first[1:].contiguous(), token, right=True).clamp(max=batch - 1)
    own = (rows.seq_lens - first.diff())[row] + token - first[row]
    position, raw, _ = rows.raw(codes)
    seen = raw[row] & (position[row] <= own[:, None])
    if window:
        seen &= position[row] > own[:, None] - window
    seen &= (token < first[-1])[:, None]
    entry = rows.entries.clamp(min=0)[row]
    # A column without a token would bring in another row's, and a weight of zero does not hide what is no number.
    keys, values = (
        x[entry].masked_fill(~raw[row][..., None, None], 0.0).transpose(1, 2) for x in (copies.keys, copies.values)
    )
    if mean is not None:
        keys = keys.float() - mean[:, None]
    # Every token as a row of its own.
    merge_attention(query, out, lse, keys, values, seen[:, None], scale=scale, softcap=softcap)
