"""Launch the Gluon kernel."""

from functools import cache

import torch

from turboquant_core.ops.kernels.decode.call import AttendCall
from turboquant_core.ops.kernels.decode.fragment_kernel import fragment_kernel
from turboquant_core.ops.kernels.decode.launch import overlapped, padded_batch
from turboquant_core.ops.kernels.decode.lookup import lookup


def run_fragment(call: AttendCall) -> None:
    """Write the partial results of a call."""
    batch, num_kv_heads, padded, head_dim = call.operand.shape
    key, value = lookup(head_dim, call.key_bits), lookup(head_dim, call.value_bits)
    table = _table(head_dim, call.key_bits, call.value_bits, call.operand.device)
    views, launch = call.views, call.launch
    key_codes, value_codes = words(views.key_codes), words(views.value_codes)
    fragment_kernel[call.grid](
        call.operand, call.factor, call.bias, key_codes, value_codes, views.key_scales, views.value_scales,
        call.block_table, call.seq_lens, call.seq_starts, call.query_start_loc, call.cu_tiles, table,
        call.partial, call.stats, batch, num_kv_heads, call.block_table_stride,
        key_codes.stride(0), key_codes.stride(1), value_codes.stride(0), value_codes.stride(1),
        views.key_scales.stride(0), views.key_scales.stride(1),
        views.value_scales.stride(0), views.value_scales.stride(1), call.query_len, call.num_tokens, call.row_capacity,
        call.last_block, call.softcap,
        head_dim=head_dim, key_bits=call.key_bits, value_bits=call.value_bits, group=call.group, num_columns=padded,
        columns=launch.columns, block_size=0 if call.block_table is None else views.key_codes.shape[2],
        subtiles=launch.tile // 16, window=call.window, has_softcap=call.softcap > 0, stages=launch.stages,
        block_batch=padded_batch(batch),
        key_asm=key.key_asm, key_constraints=key.key_constraints, key_constants=len(key.table),
        value_asm=value.value_asm, value_constraints=value.value_constraints, value_constants=len(value.table),
        overlap=launch.overlap, num_warps=1, **overlapped(launch),
    )  # fmt: skip


def words(codes: torch.Tensor) -> torch.Tensor:
    """Code bytes [..., n] as int32 [..., n / 4], without copying."""
    return codes.view(torch.int32)


@cache
def _table(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> torch.Tensor:
    constants = (*lookup(head_dim, key_bits).table, *lookup(head_dim, value_bits).table)
    return torch.tensor(constants, dtype=torch.int32, device=device)[:, None].repeat(1, 32)
