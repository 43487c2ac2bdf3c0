"""Launch decode attention: prepare, attend, combine."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.decode_attention.call import AttendCall, AttendTensors
from turboquant_core.ops.decode_attention.combine import combine_kernel
from turboquant_core.ops.decode_attention.path import Attend, DecodePath, Operand
from turboquant_core.ops.decode_attention.prepare import prepare_kernel
from turboquant_core.ops.decode_attention.sizes import Card, DecodeLaunch, DecodeShape, overlapped
from turboquant_core.rotation import Rotation

LOG2_E = 1.4426950408889634
# They hold a rotation of 128 channels while they wait.
MERGE_WARPS = 8


@dataclass(frozen=True)
class Attention:
    """What a call launches, planned before its data.

    Attributes:
        call: What is known of it.
        prepare: Rotates the query, and lays the tiles of all rows in one line.
        attend: Writes partial results.
        combine: Merges them.
        steps: See `Operand`.
    """

    call: AttendCall
    prepare: "partial[None]"
    attend: Attend
    combine: "partial[None]"
    steps: int

    def __call__(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor | None,
        seq_lens: torch.Tensor,
        *,
        query_start_loc: torch.Tensor | None,
        seq_starts: torch.Tensor | None,
        sinks: torch.Tensor | None,
        key_mean: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attend and write `out` [num_tokens, num_heads, head_dim] and `lse` [num_tokens, num_heads] where given."""
        sizes, device, batch = self.call.sizes, self.call.device, self.call.counts.batch
        num_columns, num_kv_heads = sizes.num_columns, self.call.layout.num_kv_heads
        slots = self.call.launch.num_workers + batch
        columns = (batch, num_kv_heads, num_columns)
        if self.steps:
            operand = torch.empty(*columns, 2, sizes.num_positions, dtype=torch.int8, device=device)
            offset = torch.empty(columns, dtype=torch.int32, device=device)
        else:
            operand = torch.empty(*columns, sizes.num_positions, dtype=torch.float16, device=device)
            offset = None
        factor = torch.empty(columns, dtype=torch.float32, device=device)
        tensors = AttendTensors(
            operand,
            offset,
            factor,
            None if key_mean is None else torch.empty_like(factor),
            pages,
            block_table,
            seq_lens,
            seq_starts,
            query_start_loc,
            torch.empty(batch + 1, dtype=torch.int32, device=device),
            torch.empty(slots, num_kv_heads, num_columns, sizes.num_positions, dtype=torch.float32, device=device),
            torch.empty(slots, num_kv_heads, 2, num_columns, dtype=torch.float32, device=device),
        )
        mean_row_stride = key_mean.stride(0) if key_mean is not None and key_mean.ndim == 3 else 0
        self.prepare(tensors, query, key_mean, *query.stride()[:2], mean_row_stride)
        self.attend(tensors)
        self.combine(tensors, sinks, out, lse, *out.stride()[:2])


def plan(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    layout: KVCacheLayout,
    path: DecodePath,
    launch: DecodeLaunch,
    *,
    batch: int,
    query_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Attention:
    """What calls with tensors like these launch; nothing of the tensors is kept."""
    head_dim, bits = layout.config.head_dim, (int(layout.config.key_bits), int(layout.config.value_bits))
    operand = path.operand(head_dim, *bits)
    query_rotation, query_sums, output_rotation = _rotations(operand, head_dim, query.device)
    num_positions = query_rotation.shape[0]
    call = AttendCall.of(
        query,
        pages,
        block_table,
        layout,
        launch,
        batch=batch,
        query_len=query_len,
        num_positions=num_positions,
        window=window,
        softcap=softcap * LOG2_E,
    )
    heads = batch * query_len * query.shape[1]
    block_positions = min(launch.prepare_positions, num_positions)
    block_dim = 8 * padded_octet(head_dim)
    common: dict[str, Any] = {
        "batch": batch,
        "num_tokens": query.shape[0],
        "query_len": query_len,
        "layout": call.layout,
        "sizes": call.sizes,
        "block_dim": block_dim,
        "precision": "tf32x3" if card_of(query.device).capability >= (8, 0) else "ieee",
    }
    prepare = partial(
        prepare_kernel[(-(-heads // launch.prepare_heads), num_positions // block_positions)],
        rotation=query_rotation,
        row_capacity=call.counts.row_capacity,
        rotation_sums=query_sums,
        scale=scale,
        score_scale=scale * operand.key_unit / max(operand.steps, 1),
        steps=operand.steps,
        block_heads=launch.prepare_heads,
        block_channels=min(launch.prepare_channels, block_dim),
        block_positions=block_positions,
        num_warps=4,
        **common,
        **overlapped(launch),
    )
    combine = partial(
        combine_kernel[(-(-heads // launch.merge_heads),)],
        rotation=output_rotation,
        num_workers=launch.num_workers,
        block_heads=launch.merge_heads,
        block_slots=launch.merge_slots,
        block_channels=min(launch.merge_channels, block_dim),
        num_warps=MERGE_WARPS,
        **common,
        **overlapped(launch),
    )
    return Attention(call, prepare, path.plan(call), combine, operand.steps)


def choose_launch(
    path: DecodePath,
    layout: KVCacheLayout,
    batch: int,
    num_columns: int,
    max_row_tokens: int,
    device: torch.device,
) -> DecodeLaunch:
    """The launch for a batch of rows of up to max_row_tokens stored tokens, with num_columns queries a KV head."""
    config = layout.config
    shape = DecodeShape(
        batch=batch,
        num_kv_heads=layout.num_kv_heads,
        head_dim=config.head_dim,
        key_bits=int(config.key_bits),
        value_bits=int(config.value_bits),
        num_columns=num_columns,
        max_tokens=batch * max_row_tokens,
    )
    return path.launch_of(shape, card_of(device))


@cache
def card_of(device: torch.device) -> Card:
    """The card behind a device; the interpreter's CPU counts as a small one that has no inline assembly."""
    if device.type != "cuda":
        return Card((0, 0), 2)
    if torch.version.hip is not None:
        # Capabilities are NVIDIA's numbers, and what follows from them NVIDIA's features.
        return Card((0, 0), torch.cuda.get_device_properties(device).multi_processor_count)
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


@cache
def _rotations(
    operand: Operand, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Π for queries, its rows' sum times the offset of keys, and Π times the unit of values for outputs.

    float32 [num_positions, head_dim], [head_dim] and [num_positions, head_dim], rows in operand order.
    """
    # The last row is that of padding.
    matrix = torch.nn.functional.pad(Rotation(head_dim).matrix, (0, 0, 0, 1))
    queries, outputs = matrix[list(operand.query_channels)], matrix[list(operand.output_channels)] * operand.value_unit
    sums = queries.sum(0) * (operand.key_offset * operand.steps)
    return queries.float().to(device), sums.float().to(device), outputs.float().to(device)
