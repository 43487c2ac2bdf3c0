"""What the kernels of decode attention take."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import row_capacity
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops._page_layout import PageLayout, page_layout
from turboquant_core.ops.decode_attention.sizes import DecodeLaunch, padded_batch

LOG2_E = 1.4426950408889634


class AttendTensors(NamedTuple):
    """The cache, and what kernels leave for the ones after them, as one argument of a kernel.

    Attributes:
        pages: uint8 [num_blocks, num_kv_heads, head_bytes].
        block_table: int32 [batch, max_blocks], or None when row b is page b.
        seq_lens: int32 [batch].
        seq_starts: int32 [batch], or None.
        seq_ends: int32 [batch], or None.
        query_start_loc: int32 [batch + 1], or None when every row has query_len tokens.
        cu_tiles: int32 [batch + 1], the tiles of all rows in one line.
        bias: float32 [batch, num_kv_heads, num_columns], the score of the key mean, log2 units; None without one.
        partial: float32 [num_workers + batch, num_kv_heads, num_columns, num_positions].
        stats: float32 [num_workers + batch, num_kv_heads, 2, num_columns], the reference exponent (log2) and the sum.
        page_stride: From page to page, in bytes.
        page_head_stride: From head to head of a page.
    """

    pages: torch.Tensor
    block_table: torch.Tensor | None
    seq_lens: torch.Tensor
    seq_starts: torch.Tensor | None
    seq_ends: torch.Tensor | None
    query_start_loc: torch.Tensor | None
    cu_tiles: torch.Tensor
    bias: torch.Tensor | None
    partial: torch.Tensor
    stats: torch.Tensor
    page_stride: int
    page_head_stride: int


class AttendEnds(NamedTuple):
    """What a call attends for, and what it writes.

    Attributes:
        query: [num_tokens, num_heads, head_dim].
        transform: What keys went through.
        sinks: float32 [num_heads], natural logits, or None.
        out: Like the query.
        lse: float32 [num_tokens, num_heads], natural units, or None.
    """

    query: torch.Tensor
    transform: "AttendTransform"
    sinks: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor | None


class AttendTransform(NamedTuple):
    """A `KeyTransform` as one argument of a kernel, with strides from row to row; 0 where all rows share a part.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], or one of each row, or None.
        scale: The same.
        order: int64 of the same shape, or None.
    """

    mean: torch.Tensor | None
    scale: torch.Tensor | None
    order: torch.Tensor | None
    mean_row_stride: int
    scale_row_stride: int
    order_row_stride: int

    @classmethod
    def of(cls, transform: KeyTransform) -> "AttendTransform":
        """The parts of a transform, contiguous, with their strides."""
        parts = transform.parts
        return cls(*parts, *(0 if part is None or part.ndim == 2 else part.stride(0) for part in parts))


class AttendCounts(NamedTuple):
    """Numbers that kernels are not compiled anew for; an argument each, since Triton specialises what is in a tuple.

    Attributes:
        batch: Rows.
        num_tokens: Query tokens of all rows.
        query_len: The most query tokens of a row.
        row_capacity: The most stored tokens of a row.
        last_block: The last page.
        block_table_stride: From row to row.
    """

    batch: int
    num_tokens: int
    query_len: int
    row_capacity: int
    last_block: int
    block_table_stride: int


class AttendSizes(NamedTuple):
    """What kernels are compiled for beside the layout, as one argument.

    Attributes:
        group: Query heads of a KV head.
        num_columns: Query heads of a KV head times query tokens of a row, rounded up to whole programs.
        columns: Of them those of a program.
        num_positions: Channels of a head, padded after every eighth where that makes a power of two.
        tile: Tokens that a program attends to at a time.
        window: Positions that a token sees; 0 for all.
        has_softcap: Whether there is one.
        block_batch: Rows as a power of two.
        overlap: Whether a kernel starts while the one before it runs.
    """

    group: int
    num_columns: int
    columns: int
    num_positions: int
    tile: int
    window: int
    has_softcap: bool
    block_batch: int
    overlap: bool


@dataclass(frozen=True)
class AttendCall:
    """What is known of a call before its data.

    Attributes:
        layout: Of the pages.
        launch: Sizes of the launch.
        device: Where it runs.
        counts: See there.
        sizes: See there.
        scale: Of a logit.
        softcap: In log2 units; 0 for none.
    """

    layout: PageLayout
    launch: DecodeLaunch
    device: torch.device
    counts: AttendCounts
    sizes: AttendSizes
    scale: float
    softcap: float

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor | None,
        layout: KVCacheLayout,
        launch: DecodeLaunch,
        *,
        batch: int,
        query_len: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> "AttendCall":
        """The call of tensors like these; `softcap` in natural units."""
        num_tokens, num_heads, _ = query.shape
        max_blocks, block_table_stride = (
            (1, 0) if block_table is None else (block_table.shape[1], block_table.stride(0))
        )
        counts = AttendCounts(
            batch=batch,
            num_tokens=num_tokens,
            query_len=query_len,
            row_capacity=row_capacity(len(pages), max_blocks, layout.block_size),
            last_block=len(pages) - 1,
            block_table_stride=block_table_stride,
        )
        sizes = AttendSizes(
            group=num_heads // layout.num_kv_heads,
            num_columns=launch.padded_columns,
            columns=launch.columns,
            num_positions=8 * padded_octet(layout.config.head_dim),
            tile=launch.tile,
            window=window,
            has_softcap=softcap > 0,
            block_batch=padded_batch(batch),
            overlap=launch.overlap,
        )
        return cls(page_layout(layout), launch, query.device, counts, sizes, scale, softcap * LOG2_E)

    @property
    def grid(self) -> tuple[int, int]:
        """Workers, and KV heads times groups of columns."""
        return self.launch.num_workers, self.layout.num_kv_heads * self.sizes.num_columns // self.sizes.columns

    def arguments(self) -> dict[str, Any]:
        """What every kernel that attends takes beside tensors, by name."""
        return {
            **self.counts._asdict(),
            "softcap": self.softcap,
            "layout": self.layout,
            "sizes": self.sizes,
        }
