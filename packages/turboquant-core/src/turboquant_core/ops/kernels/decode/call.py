"""What the two attend kernels are launched with."""

from dataclasses import dataclass

import torch

from turboquant_core.config import TurboQuantConfig
from turboquant_core.layout import PageViews
from turboquant_core.ops._bounds import row_capacity
from turboquant_core.ops.kernels.decode.launch import DecodeLaunch


@dataclass(frozen=True)
class AttendCall:
    """A prepared query, the cache, and where partial results go.

    Attributes:
        operand: float16 [batch, num_kv_heads, num_columns, num_positions], rotated queries over their length.
        factor: float32 [batch, num_kv_heads, num_columns], what scores are multiplied with, log2 units.
        bias: Like `factor`, the score of the key mean; None without one.
        views: The cache.
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
        config: What is stored for one head.
        launch: Sizes of the launch.
    """

    operand: torch.Tensor
    factor: torch.Tensor
    bias: torch.Tensor | None
    views: PageViews
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
    config: TurboQuantConfig
    launch: DecodeLaunch

    @property
    def key_bits(self) -> int:
        """Bits of a key coordinate."""
        return int(self.config.key_bits)

    @property
    def value_bits(self) -> int:
        """Bits of a value coordinate."""
        return int(self.config.value_bits)

    @property
    def row_capacity(self) -> int:
        """The most stored tokens of a row."""
        num_blocks, _, block_size, _ = self.views.key_codes.shape
        return row_capacity(num_blocks, 1 if self.block_table is None else self.block_table.shape[1], block_size)

    @property
    def last_block(self) -> int:
        """The number of the cache's last block."""
        return self.views.key_codes.shape[0] - 1

    @property
    def grid(self) -> tuple[int, int]:
        """Workers, and KV heads times groups of columns."""
        _, num_kv_heads, padded, _ = self.operand.shape
        return self.launch.num_workers, num_kv_heads * padded // self.launch.columns

    @property
    def block_table_stride(self) -> int:
        """Entries from row to row of the block table."""
        return 0 if self.block_table is None else self.block_table.stride(0)
