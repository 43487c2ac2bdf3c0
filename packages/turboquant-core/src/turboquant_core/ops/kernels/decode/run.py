"""Launch decode attention: prepare, attend, combine."""

from functools import cache

import torch

from turboquant_core.config import TurboQuantConfig
from turboquant_core.layout import PageViews
from turboquant_core.ops.kernels.decode.call import AttendCall
from turboquant_core.ops.kernels.decode.combine import combine_kernel
from turboquant_core.ops.kernels.decode.launch import (
    Card,
    DecodeLaunch,
    DecodeShape,
    fragment_launch,
    overlapped,
    padded_batch,
    portable_launch,
)
from turboquant_core.ops.kernels.decode.prepare import prepare_kernel
from turboquant_core.ops.kernels.decode.run_portable import run_portable
from turboquant_core.ops.kernels.split_rotation import padded_octet
from turboquant_core.ops.paths import KernelPath
from turboquant_core.rotation import Rotation

LOG2_E = 1.4426950408889634


def run_decode_attention(
    query: torch.Tensor,
    views: PageViews,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    config: TurboQuantConfig,
    path: KernelPath,
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
    num_kv_heads = views.key_codes.shape[1]
    group = num_heads // num_kv_heads
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    device = query.device
    slots, padded = launch.num_workers + batch, launch.padded_columns
    query_rotation, output_rotation = _rotations(head_dim, key_bits, value_bits, path == "fragment", device)
    num_positions = query_rotation.shape[0]
    operand = torch.empty(batch, num_kv_heads, padded, num_positions, dtype=torch.float16, device=device)
    factor = torch.empty(batch, num_kv_heads, padded, dtype=torch.float32, device=device)
    bias = torch.empty_like(factor) if key_mean is not None else None
    cu_tiles = torch.empty(batch + 1, dtype=torch.int32, device=device)
    partial = torch.empty(slots, num_kv_heads, padded, num_positions, dtype=torch.float32, device=device)
    stats = torch.empty(slots, num_kv_heads, 2, padded, dtype=torch.float32, device=device)
    call = AttendCall(
        operand, factor, bias, views, block_table, seq_lens, seq_starts, query_start_loc, cu_tiles, partial, stats,
        num_tokens, query_len, group, window, softcap * LOG2_E, config, launch,
    )  # fmt: skip
    # Triton's own next_power_of_2 and cdiv take the host many times as long: they are functions of its compiler.
    block_dim = 1 << (head_dim - 1).bit_length()
    precision = "tf32x3" if card_of(device).capability >= (8, 0) else "ieee"
    heads = batch * query_len * num_heads
    block_positions = min(launch.prepare_positions, num_positions)
    prepare_kernel[(-(-heads // launch.prepare_heads), num_positions // block_positions)](
        query, query_start_loc, seq_lens, seq_starts, query_rotation, key_mean, operand, factor, bias, cu_tiles,
        scale, scale / head_dim**0.5, batch, num_heads, num_tokens, query.stride(0), query.stride(1),
        key_mean.stride(0) if key_mean is not None and key_mean.ndim == 3 else 0, query_len, call.row_capacity,
        group=group, num_columns=padded, head_dim=head_dim, num_positions=num_positions, tile=launch.tile,
        window=window, block_batch=padded_batch(batch), block_heads=launch.prepare_heads, block_dim=block_dim,
        block_channels=min(launch.prepare_channels, block_dim), block_positions=block_positions, precision=precision,
        overlap=launch.overlap, num_warps=4,
    )  # fmt: skip
    if path == "fragment":
        from turboquant_core.ops.kernels.decode.run_fragment import run_fragment

        run_fragment(call)
    else:
        run_portable(call, path)
    combine_kernel[(-(-heads // launch.merge_heads),)](
        partial, stats, cu_tiles, query_start_loc, output_rotation, bias, sinks, out, lse,
        batch, num_heads, num_tokens, launch.num_workers, out.stride(0), out.stride(1), query_len,
        centred_scores=bias is not None and softcap == 0, group=group, num_columns=padded, head_dim=head_dim,
        num_positions=num_positions, block_heads=launch.merge_heads, block_slots=launch.merge_slots,
        block_dim=block_dim, block_channels=min(launch.merge_channels, block_dim), precision=precision,
        overlap=launch.overlap, num_warps=launch.merge_warps, **overlapped(launch),
    )  # fmt: skip


def choose_launch(
    path: KernelPath,
    config: TurboQuantConfig,
    batch: int,
    num_kv_heads: int,
    num_columns: int,
    max_row_tokens: int,
    device: torch.device,
) -> DecodeLaunch:
    """The launch for a batch of rows of up to max_row_tokens stored tokens, with num_columns queries a KV head."""
    shape = DecodeShape(
        batch,
        num_kv_heads,
        config.head_dim,
        int(config.key_bits),
        int(config.value_bits),
        num_columns,
        batch * max_row_tokens,
    )
    return (fragment_launch if path == "fragment" else portable_launch)(shape, card_of(device))


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
    head_dim: int, key_bits: int, value_bits: int, fragment: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Π for queries and Π / sqrt(head_dim) for outputs, float32 [num_positions, head_dim], rows in operand order.

    Kernels look up centroids of unit variance, which are sqrt(head_dim) times those of a unit vector.
    """
    matrix = Rotation(head_dim).matrix
    if fragment:
        from turboquant_core.ops.kernels.decode.fragments import operand_channels

        queries, outputs = (matrix[order] for order in operand_channels(head_dim, key_bits, value_bits))
    else:
        octet, padded = head_dim // 8, padded_octet(head_dim)
        queries = torch.zeros(8, padded, head_dim, dtype=matrix.dtype)
        queries[:, :octet] = matrix.unflatten(0, (8, octet))
        queries = outputs = queries.flatten(0, 1)
    return queries.float().to(device), (outputs / head_dim**0.5).float().to(device)
