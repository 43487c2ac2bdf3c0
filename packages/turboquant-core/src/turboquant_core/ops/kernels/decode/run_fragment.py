"""Launch the Gluon kernel."""

from functools import cache

import torch

from turboquant_core.config import TurboQuantConfig
from turboquant_core.layout import PageViews
from turboquant_core.ops.kernels.decode.fragment_kernel import fragment_kernel
from turboquant_core.ops.kernels.decode.launch import DecodeLaunch, overlapped, padded_batch
from turboquant_core.ops.kernels.decode.lookup import lookup


def run_fragment(
    operand: torch.Tensor,
    factor: torch.Tensor,
    bias: torch.Tensor | None,
    views: PageViews,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    seq_starts: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    cu_tiles: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    query_len: int,
    softcap: float,
    group: int,
    window: int,
    config: TurboQuantConfig,
    launch: DecodeLaunch,
) -> None:
    """Write the partial results; arguments as the kernel describes them."""
    batch, num_kv_heads, padded, head_dim = operand.shape
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    key, value = lookup(head_dim, key_bits), lookup(head_dim, value_bits)
    key_codes, value_codes = words(views.key_codes), words(views.value_codes)
    fragment_kernel[(launch.num_workers, num_kv_heads * padded // launch.columns)](
        operand, factor, bias, key_codes, value_codes, views.key_scales, views.value_scales, block_table, seq_lens,
        seq_starts, query_start_loc, cu_tiles, _table(head_dim, key_bits, value_bits, operand.device), partial, stats,
        batch, num_kv_heads, 0 if block_table is None else block_table.stride(0),
        key_codes.stride(0), key_codes.stride(1), value_codes.stride(0), value_codes.stride(1),
        views.key_scales.stride(0), views.key_scales.stride(1),
        views.value_scales.stride(0), views.value_scales.stride(1), query_len, softcap,
        head_dim=head_dim, key_bits=key_bits, value_bits=value_bits, group=group, num_columns=padded,
        columns=launch.columns, block_size=0 if block_table is None else views.key_codes.shape[2],
        subtiles=launch.tile // 16, window=window, has_softcap=softcap > 0, stages=launch.stages,
        block_batch=padded_batch(batch),
        key_asm=key.key_asm, key_constraints=key.key_constraints, key_constants=len(key.table),
        value_asm=value.value_asm, value_constraints=value.value_constraints, value_constants=len(value.table),
        overlap=launch.overlap, num_warps=1, maxnreg=launch.max_registers, **overlapped(launch),
    )  # fmt: skip


def words(codes: torch.Tensor) -> torch.Tensor:
    """Code bytes [..., n] as int32 [..., n / 4], without copying."""
    return codes.view(torch.int32)


@cache
def _table(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> torch.Tensor:
    constants = (*lookup(head_dim, key_bits).table, *lookup(head_dim, value_bits).table)
    return torch.tensor(constants, dtype=torch.int32, device=device)[:, None].repeat(1, 32)
