"""Launch decode attention: prepare, attend, combine."""

from collections.abc import Callable
from functools import cache

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.combine import combine_kernel
from turboquant_core.ops.decode_attention.path import DecodePath
from turboquant_core.ops.decode_attention.prepare import prepare_kernel
from turboquant_core.ops.decode_attention.sizes import Card, DecodeLaunch, DecodeShape, overlapped, padded_batch
from turboquant_core.rotation import Rotation

LOG2_E = 1.4426950408889634


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: KVCacheLayout,
    path: DecodePath,
    launch: DecodeLaunch,
    *,
    scale: float,
    query_len: int,
    query_start_loc: torch.Tensor | None,
    seq_starts: torch.Tensor | None,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    key_mean: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Attend and write `out` [num_tokens, num_heads, head_dim] and `lse` [num_tokens, num_heads] where it is given."""
    batch, (num_tokens, num_heads, head_dim) = len(seq_lens), query.shape
    num_kv_heads, device = layout.num_kv_heads, query.device
    group = num_heads // num_kv_heads
    slots, padded = launch.num_workers + batch, launch.padded_columns
    bits = int(layout.config.key_bits), int(layout.config.value_bits)
    query_rotation, output_rotation = _rotations(path.positions, head_dim, *bits, device)
    num_positions = query_rotation.shape[0]
    operand = torch.empty(batch, num_kv_heads, padded, num_positions, dtype=torch.float16, device=device)
    factor = torch.empty(batch, num_kv_heads, padded, dtype=torch.float32, device=device)
    bias = torch.empty_like(factor) if key_mean is not None else None
    cu_tiles = torch.empty(batch + 1, dtype=torch.int32, device=device)
    partial = torch.empty(slots, num_kv_heads, padded, num_positions, dtype=torch.float32, device=device)
    stats = torch.empty(slots, num_kv_heads, 2, padded, dtype=torch.float32, device=device)
    call = AttendCall(
        operand=operand,
        factor=factor,
        bias=bias,
        pages=pages,
        layout=layout,
        block_table=block_table,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        query_start_loc=query_start_loc,
        cu_tiles=cu_tiles,
        partial=partial,
        stats=stats,
        num_tokens=num_tokens,
        query_len=query_len,
        group=group,
        window=window,
        softcap=softcap * LOG2_E,
        launch=launch,
    )
    block_dim = 8 * padded_octet(head_dim)
    precision = "tf32x3" if card_of(device).capability >= (8, 0) else "ieee"
    heads = batch * query_len * num_heads
    block_positions = min(launch.prepare_positions, num_positions)
    # Triton's own cdiv takes the host many times as long: it is a function of its compiler.
    prepare_kernel[(-(-heads // launch.prepare_heads), num_positions // block_positions)](
        query=query,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        rotation=query_rotation,
        key_mean=key_mean,
        operand=operand,
        factor=factor,
        bias=bias,
        cu_tiles=cu_tiles,
        scale=scale,
        score_scale=scale / head_dim**0.5,
        batch=batch,
        num_heads=num_heads,
        num_tokens=num_tokens,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        mean_row_stride=key_mean.stride(0) if key_mean is not None and key_mean.ndim == 3 else 0,
        query_len=query_len,
        row_capacity=call.row_capacity,
        group=group,
        num_columns=padded,
        head_dim=head_dim,
        num_positions=num_positions,
        tile=launch.tile,
        window=window,
        block_batch=padded_batch(batch),
        block_heads=launch.prepare_heads,
        block_dim=block_dim,
        block_channels=min(launch.prepare_channels, block_dim),
        block_positions=block_positions,
        precision=precision,
        overlap=launch.overlap,
        num_warps=4,
    )
    path.attend(call)
    combine_kernel[(-(-heads // launch.merge_heads),)](
        partial=partial,
        partial_stats=stats,
        cu_tiles=cu_tiles,
        query_start_loc=query_start_loc,
        rotation=output_rotation,
        bias=bias,
        sinks=sinks,
        out=out,
        lse=lse,
        batch=batch,
        num_heads=num_heads,
        num_tokens=num_tokens,
        num_workers=launch.num_workers,
        out_token_stride=out.stride(0),
        out_head_stride=out.stride(1),
        query_len=query_len,
        centred_scores=bias is not None and softcap == 0,
        group=group,
        num_columns=padded,
        head_dim=head_dim,
        num_positions=num_positions,
        block_heads=launch.merge_heads,
        block_slots=launch.merge_slots,
        block_dim=block_dim,
        block_channels=min(launch.merge_channels, block_dim),
        precision=precision,
        overlap=launch.overlap,
        num_warps=launch.merge_warps,
        **overlapped(launch),
    )


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
    positions: Callable[[int, int, int], tuple[list[int], list[int]]],
    head_dim: int,
    key_bits: int,
    value_bits: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Π for queries and Π / sqrt(head_dim) for outputs, float32 [num_positions, head_dim], rows in operand order.

    Kernels look up centroids of unit variance, which are sqrt(head_dim) times those of a unit vector.
    """
    matrix = torch.nn.functional.pad(Rotation(head_dim).matrix, (0, 0, 0, 1))
    # The last row is that of padding.
    queries, outputs = (matrix[channels] for channels in positions(head_dim, key_bits, value_bits))
    return queries.float().to(device), (outputs / head_dim**0.5).float().to(device)
