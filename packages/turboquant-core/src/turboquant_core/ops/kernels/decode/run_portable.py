"""Launch the portable Triton kernel."""

from typing import Literal

from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops.kernels.decode.call import AttendCall
from turboquant_core.ops.kernels.decode.launch import overlapped, padded_batch
from turboquant_core.ops.kernels.decode.lookup import MAX_PRMT_BITS
from turboquant_core.ops.kernels.decode.portable_kernel import portable_kernel
from turboquant_core.ops.kernels.decode.portable_lookup import entries, entry_unit, entry_words
from turboquant_core.ops.kernels.split_rotation import padded_octet

PortablePath = Literal["fp16", "int8", "fp8", "portable"]


def run_portable(call: AttendCall, path: PortablePath) -> None:
    """Write the partial results of a call."""
    batch, num_kv_heads, padded, _ = call.operand.shape
    head_dim, device, views, launch = call.config.head_dim, call.operand.device, call.views, call.launch
    key_product = path if path in ("int8", "fp8") else "float16"
    # The interpreter has no inline assembly: there every path looks the same entries up by gathering.
    assembly = path != "portable" and not interpreting()
    key_permute = assembly and call.key_bits <= MAX_PRMT_BITS
    value_permute = assembly and call.value_bits <= MAX_PRMT_BITS
    key_table = (entry_words if key_permute else entries)(head_dim, call.key_bits, key_product, device)
    value_table = (entry_words if value_permute else entries)(head_dim, call.value_bits, "float16", device)
    portable_kernel[call.grid](
        call.operand, call.factor, call.bias, views.key_codes, views.value_codes, views.key_scales, views.value_scales,
        call.block_table, call.seq_lens, call.seq_starts, call.query_start_loc, call.cu_tiles, key_table, value_table,
        call.partial, call.stats, batch, num_kv_heads, call.block_table_stride,
        views.key_codes.stride(0), views.key_codes.stride(1), views.value_codes.stride(0), views.value_codes.stride(1),
        views.key_scales.stride(0), views.key_scales.stride(1),
        views.value_scales.stride(0), views.value_scales.stride(1), call.query_len, call.num_tokens, call.row_capacity,
        call.last_block, call.softcap,
        entry_unit(head_dim, call.key_bits, key_product),
        head_dim=head_dim, padded_octet=padded_octet(head_dim), key_bits=call.key_bits, value_bits=call.value_bits,
        group=call.group, num_columns=padded, columns=launch.columns, block_size=views.key_codes.shape[2],
        tile=launch.tile, window=call.window, has_softcap=call.softcap > 0, block_batch=padded_batch(batch),
        key_product=key_product, key_permute=key_permute, value_permute=value_permute, widen=interpreting(),
        overlap=launch.overlap, num_warps=launch.num_warps, **overlapped(launch),
    )  # fmt: skip
