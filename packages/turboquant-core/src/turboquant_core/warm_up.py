"""Compile ahead of time what a server will launch."""

from typing import Any

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.ops.cache_update.triton.sizes import representative_tokens
from turboquant_core.ops.decode_attention import MAX_QUERY_LEN, decode_attention
from turboquant_core.ops.decode_attention.paths import choose_path
from turboquant_core.ops.decode_attention.sizes import representative_batches
from turboquant_core.ops.merge_attention import merge_copies
from turboquant_core.ops.raw_copies import copy_update
from turboquant_core.raw_copies import CopyColumns, CopyRows, RawCopies


def warm_up(
    layout: KVCacheLayout,
    *,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    max_batch: int,
    max_blocks: int,
    max_query_len: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    copies: CopyColumns | None = None,
    key_transform: KeyTransform = IDENTITY,
) -> None:
    """Launch cache_update and decode_attention once with every kernel that calls of these kinds compile.

    Args:
        layout: Of the pages.
        num_heads: Query heads.
        dtype: Of queries, keys and values.
        device: Where they are.
        max_batch: The most rows of a call.
        max_blocks: The width of its block table.
        max_query_len: The most query tokens of a row; fewer are covered too.
        window: As in `decode_attention`.
        softcap: As in `decode_attention`.
        has_sinks: Whether calls give sinks.
        copies: Of which tokens calls attend to raw copies instead of codes; None for none.
        key_transform: As in `decode_attention`.

    Raises:
        ValueError: If `max_query_len` is not 1 to 16, or as `decode_attention` raises.
    """
    if not 1 <= max_query_len <= MAX_QUERY_LEN:
        raise ValueError(f"max_query_len is {max_query_len}; decode attention takes 1 to {MAX_QUERY_LEN}")
    num_kv_heads, head_dim = layout.num_kv_heads, layout.config.head_dim
    pages = torch.zeros(1, num_kv_heads, layout.head_bytes, dtype=torch.uint8, device=device)
    sinks = torch.zeros(num_heads, device=device) if has_sinks else None
    for num_tokens in representative_tokens(dtype, only_centres=key_transform.only_centres):
        vectors = torch.zeros(num_tokens, num_kv_heads, head_dim, dtype=dtype, device=device)
        slot_mapping = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
        cache_update(vectors, vectors, pages, slot_mapping, layout, key_transform=key_transform)
    for query_len in range(1, max_query_len + 1):
        for batch in _batches(layout, pages, num_heads * query_len, max_batch, max_blocks):
            lengths = torch.full((batch,), query_len, dtype=torch.int32, device=device)
            query = torch.zeros(batch * query_len, num_heads, head_dim, dtype=dtype, device=device)
            # Every row the same one: no memory for a table that may be large.
            block_table = torch.zeros(1, max_blocks, dtype=torch.int32, device=device).expand(batch, -1)
            start_loc = None
            if query_len > 1:
                start_loc = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
            options: dict[str, Any] = {"query_start_loc": start_loc, "max_query_len": query_len, "sinks": sinks}
            options |= {"window": window, "softcap": softcap, "key_transform": key_transform}
            if copies is None:
                decode_attention(query, pages, block_table, lengths, layout, **options)
                continue
            options |= {"seq_starts": torch.zeros_like(lengths), "seq_ends": lengths.clone(), "return_lse": True}
            out, lse = decode_attention(query, pages, block_table, lengths, layout, **options)
            entries = torch.full((batch, copies.num_columns), -1, dtype=torch.int32, device=device)
            rows = CopyRows(copies, entries, lengths, start_loc, block_table, len(query), query_len)
            own = torch.zeros(len(query), num_kv_heads, head_dim, dtype=dtype, device=device)
            kept = RawCopies.allocate(layout.config, num_kv_heads, 1, dtype, device)
            # As engines call them: one behind the other.
            for reads_new in (True, False):
                codes = copy_update((own, own), pages, rows, kept, layout, reads_new=reads_new, follows_update=True)
            merge_copies(
                query, out, lse, rows, kept, codes, scale=1.0, window=window, softcap=softcap, follows_attention=True
            )


def _batches(
    layout: KVCacheLayout, pages: torch.Tensor, query_heads_of_row: int, max_batch: int, max_blocks: int
) -> list[int]:
    """Batches that between them launch every kernel of those up to max_batch."""
    path = choose_path("auto", layout, pages.device, pages)
    if path is None:
        return []
    from turboquant_core.ops.decode_attention.launch import choose_launch

    num_columns, max_row_tokens = query_heads_of_row // layout.num_kv_heads, max_blocks * layout.block_size
    return representative_batches(
        lambda batch: choose_launch(path, layout, batch, num_columns, max_row_tokens, pages.device),
        max_batch,
    )
