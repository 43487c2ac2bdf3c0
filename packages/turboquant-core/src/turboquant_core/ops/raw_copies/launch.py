"""Launch the kernels of raw copies."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import MAX_TOKENS, row_capacity
from turboquant_core.ops._card import overlap_options
from turboquant_core.ops._padding import power_of_two
from turboquant_core.ops._page_layout import page_layout
from turboquant_core.ops._triton.columns import column_counts
from turboquant_core.ops.raw_copies.assign_kernel import assign_kernel
from turboquant_core.ops.raw_copies.kernel import update_kernel
from turboquant_core.ops.raw_copies.state import CopyState
from turboquant_core.raw_copies import CodeRange, CopyColumns, CopyRows, RawCopies

NUM_WARPS = 4


def copy_update(
    new: tuple[torch.Tensor, torch.Tensor] | None,
    pages: torch.Tensor,
    rows: CopyRows,
    copies: RawCopies,
    layout: KVCacheLayout,
    *,
    reads_new: bool,
    early: bool = False,
) -> CodeRange:
    """See `turboquant_core.ops.raw_copies.copy_update`."""
    batch = len(rows.seq_lens)
    codes = CodeRange(*torch.empty(2, batch, dtype=torch.int32, device=pages.device))
    key, value = new or (None, None)
    with torch.cuda.device_of(pages):  # type: ignore[no-untyped-call]
        update_kernel[(batch, 1 if new is None else 2)](
            keys=key,
            values=value,
            pages=pages,
            block_table=rows.block_table,
            entries=rows.entries,
            seq_lens=rows.seq_lens,
            query_start_loc=rows.query_start_loc,
            copied_keys=copies.keys,
            copied_values=copies.values,
            copied_slots=copies.slots,
            copied_scales=copies.scales,
            starts=codes.starts,
            ends=codes.ends,
            key_token_stride=0 if key is None else key.stride(0),
            key_head_stride=0 if key is None else key.stride(1),
            value_token_stride=0 if value is None else value.stride(0),
            value_head_stride=0 if value is None else value.stride(1),
            page_stride=pages.stride(0),
            page_head_stride=pages.stride(1),
            table_stride=rows.block_table.stride(0),
            entries_stride=rows.entries.stride(0),
            num_tokens=rows.num_tokens,
            query_len=rows.max_query_len,
            row_capacity=row_capacity(len(pages), rows.block_table.shape[1], layout.block_size),
            last_block=len(pages) - 1,
            max_position=MAX_TOKENS,
            layout=page_layout(layout),
            **column_counts(rows.columns),
            reads_new=reads_new,
            early=early,
            block_columns=power_of_two(rows.columns.num_columns),
            block_heads=power_of_two(layout.num_kv_heads),
            block_dim=power_of_two(layout.config.head_dim),
            num_warps=NUM_WARPS,
            **overlap_options(pages.device),
        )
    return codes


# What one program holds at a time: more would leave fewer registers than its threads have.
ASSIGN_ELEMENTS = 2048
ASSIGN_WARPS = 16


def assign(
    entries: torch.Tensor,
    copies: CopyState,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_table: torch.Tensor,
    columns: CopyColumns,
    *,
    num_slots: int,
    block_size: int,
    step: int,
) -> None:
    """See `CopyTable.assign`."""
    block_columns = power_of_two(columns.num_columns)
    with torch.cuda.device_of(entries):  # type: ignore[no-untyped-call]
        assign_kernel[(1,)](
            entries=entries,
            copy_of_slot=copies.copy_of_slot,
            slot_of_copy=copies.slot_of_copy,
            used=copies.used,
            free=copies.free,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            block_table=block_table,
            rows=len(seq_lens),
            step=step,
            num_copies=len(copies.free),
            last_block=num_slots // block_size - 1,
            row_capacity=row_capacity(num_slots, block_table.shape[1], block_size),
            table_stride=block_table.stride(0),
            entries_stride=entries.stride(0),
            block_size=block_size,
            **column_counts(columns),
            block_rows=max(1, ASSIGN_ELEMENTS // block_columns),
            block_columns=block_columns,
            block_copies=ASSIGN_ELEMENTS,
            num_warps=ASSIGN_WARPS,
        )
