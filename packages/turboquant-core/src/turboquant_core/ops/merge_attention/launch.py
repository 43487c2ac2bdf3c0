"""Launch the kernel that merges."""

from typing import Any

import torch

from turboquant_core.ops._triton.columns import column_counts
from turboquant_core.ops.merge_attention.kernel import merge_kernel
from turboquant_core.ops.merge_attention.sizes import merge_sizes
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
    early: bool = False,
) -> None:
    """See `turboquant_core.ops.merge_attention`."""
    num_tables, query_len, num_columns = seen.shape
    row_stride, head_stride, token_stride, _ = keys.stride()
    _launch(
        query, out, lse, (keys, values), (len(keys), query_len, num_columns), (row_stride, token_stride, head_stride),
        scale=scale, softcap=softcap, early=early, seen=seen,
        seen_row_stride=0 if num_tables == 1 else query_len * num_columns,
    )  # fmt: skip


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
    early: bool = False,
) -> None:
    """See `turboquant_core.ops.merge_attention.merge_copies`."""
    token_stride, head_stride, _ = copies.keys.stride()
    _launch(
        query, out, lse, (copies.keys, copies.values),
        (len(rows.seq_lens), rows.max_query_len, rows.columns.num_columns), (0, token_stride, head_stride),
        scale=scale, softcap=softcap, early=early, mean=mean, entries=rows.entries,
        entries_stride=rows.entries.stride(0), seq_lens=rows.seq_lens, query_start_loc=rows.query_start_loc,
        starts=codes.starts, ends=codes.ends, window=window, **column_counts(rows.columns),
    )  # fmt: skip


def _launch(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    raw: tuple[torch.Tensor, torch.Tensor],
    sizes: tuple[int, int, int],
    strides: tuple[int, int, int],
    *,
    softcap: float,
    early: bool,
    **tokens: Any,
) -> None:
    """Launch with raw keys and values, of as many rows, query tokens and columns, which lie that far apart."""
    num_tokens, num_heads, head_dim = query.shape
    rows, query_len, num_columns = sizes
    keys, values = raw
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    num_queries = group * query_len
    constants = merge_sizes(head_dim, (query.dtype, keys.dtype), num_queries, num_columns, query.device)
    if query.stride(2) != 1:
        query, early = query.contiguous(), False
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        merge_kernel[(rows, num_kv_heads, -(-num_queries // constants["block_queries"]))](
            query=query,
            out=out,
            lse=lse,
            keys=keys,
            values=values,
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
            raw_row_stride=strides[0],
            raw_token_stride=strides[1],
            raw_head_stride=strides[2],
            num_tokens=num_tokens,
            query_len=query_len,
            softcap=softcap or None,
            group=group,
            head_dim=head_dim,
            num_columns=num_columns,
            early=early,
            **constants,
            **tokens,
        )
