"""What the kernels that attend are launched with."""

from dataclasses import dataclass
from typing import Any

import torch

from turboquant_core.layout import KVCacheLayout, PageViews
from turboquant_core.ops._bounds import row_capacity
from turboquant_core.ops.decode_attention.sizes import DecodeLaunch, padded_batch


@dataclass(frozen=True)
class AttendCall:
    """A prepared query, the cache, and where partial results go.

    Attributes:
        operand: float16 [batch, num_kv_heads, num_columns, num_positions], rotated queries over their length.
        factor: float32 [batch, num_kv_heads, num_columns], what scores are multiplied with, log2 units.
        bias: Like `factor`, the score of the key mean; None without one.
        pages: uint8 [num_blocks, num_kv_heads, head_bytes].
        layout: Of the pages.
        block_table: int32 [batch, max_blocks], or None when row b is page b.
        seq_lens: int32 [batch].
        seq_starts: int32 [batch], or None.
        query_start_loc: int32 [batch + 1], or None when every row has query_len tokens.
        cu_tiles: int32 [batch + 1], the tiles of all rows in one line.
        partial: float32 [num_workers + batch, num_kv_heads, num_columns, num_positions], written.
        stats: float32 [num_workers + batch, num_kv_heads, 2, num_columns], written.
        num_tokens: Query tokens of all rows.
        query_len: The most query tokens of a row.
        group: Query heads of a KV head.
        window: Positions that a token sees; 0 for all.
        softcap: In log2 units; 0 for none.
        launch: Sizes of the launch.
    """

    operand: torch.Tensor
    factor: torch.Tensor
    bias: torch.Tensor | None
    pages: torch.Tensor
    layout: KVCacheLayout
    block_table: torch.Tensor | None
    seq_lens: torch.Tensor
    seq_starts: torch.Tensor | None
    query_start_loc: torch.Tensor | None
    cu_tiles: torch.Tensor
    partial: torch.Tensor
    stats: torch.Tensor
    num_tokens: int
    query_len: int
    group: int
    window: int
    softcap: float
    launch: DecodeLaunch

    @property
    def row_capacity(self) -> int:
        """The most stored tokens of a row."""
        max_blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return row_capacity(len(self.pages), max_blocks, self.layout.block_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Workers, and KV heads times groups of columns."""
        return self.launch.num_workers, self.layout.num_kv_heads * self.launch.padded_columns // self.launch.columns

    def arguments(self, views: PageViews) -> dict[str, Any]:
        """What every kernel that attends takes, by name; strides are in elements of `views`."""
        config, launch, batch = self.layout.config, self.launch, len(self.seq_lens)
        key_codes, value_codes, key_scales, value_scales = (
            views.key_codes, views.value_codes, views.key_scales, views.value_scales,
        )  # fmt: skip
        # One question a tensor: every call of every layer asks.
        key_page, key_head, key_slot, _ = key_codes.stride()
        value_page, value_head, value_slot, _ = value_codes.stride()
        key_scale_page, key_scale_head, key_scale_slot, _ = key_scales.stride()
        value_scale_page, value_scale_head, value_scale_slot, _ = value_scales.stride()
        return {
            "operand": self.operand,
            "factor": self.factor,
            "bias": self.bias,
            "key_codes": key_codes,
            "value_codes": value_codes,
            "key_scales": key_scales,
            "value_scales": value_scales,
            "block_table": self.block_table,
            "seq_lens": self.seq_lens,
            "seq_starts": self.seq_starts,
            "query_start_loc": self.query_start_loc,
            "cu_tiles": self.cu_tiles,
            "partial": self.partial,
            "partial_stats": self.stats,
            "batch": batch,
            "num_kv_heads": self.layout.num_kv_heads,
            "block_table_stride": 0 if self.block_table is None else self.block_table.stride(0),
            "key_page_stride": key_page,
            "key_head_stride": key_head,
            "value_page_stride": value_page,
            "value_head_stride": value_head,
            "key_scale_page_stride": key_scale_page,
            "key_scale_head_stride": key_scale_head,
            "value_scale_page_stride": value_scale_page,
            "value_scale_head_stride": value_scale_head,
            "query_len": self.query_len,
            "num_tokens": self.num_tokens,
            "row_capacity": self.row_capacity,
            "last_block": len(self.pages) - 1,
            "softcap": self.softcap,
            "head_dim": config.head_dim,
            "key_bits": int(config.key_bits),
            "value_bits": int(config.value_bits),
            "key_code_stride": key_slot,
            "value_code_stride": value_slot,
            "key_scale_stride": key_scale_slot,
            "value_scale_stride": value_scale_slot,
            "group": self.group,
            "num_columns": launch.padded_columns,
            "columns": launch.columns,
            # Without a table a row has one page, however long that is.
            "block_size": 0 if self.block_table is None else self.layout.block_size,
            "window": self.window,
            "has_softcap": self.softcap > 0,
            "block_batch": padded_batch(batch),
            "overlap": launch.overlap,
        }
