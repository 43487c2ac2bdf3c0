"""Launch the portable Triton kernel."""

from typing import Literal

import torch

from turboquant_core.config import TurboQuantConfig
from turboquant_core.layout import PageViews
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops.kernels.decode.launch import DecodeLaunch, overlapped, padded_batch
from turboquant_core.ops.kernels.decode.portable_kernel import portable_kernel
from turboquant_core.ops.kernels.decode.portable_lookup import entries, entry_unit, entry_words
from turboquant_core.ops.kernels.split_rotation import padded_octet

PortablePath = Literal["fp16", "int8", "fp8", "portable"]
# A byte permute selects among sixteen.
MAX_PERMUTE_BITS = 4


def run_portable(
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
    *,
    path: PortablePath,
) -> None:
    """Write the partial results; arguments as the kernel describes them."""
    batch, num_kv_heads, padded, _ = operand.shape
    head_dim, device = config.head_dim, operand.device
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    key_product = path if path in ("int8", "fp8") else "float16"
    # The interpreter has no inline assembly: there every path looks the same entries up by gathering.
    assembly = path != "portable" and not interpreting()
    key_permute = assembly and key_bits <= MAX_PERMUTE_BITS
    value_permute = assembly and value_bits <= MAX_PERMUTE_BITS
    key_table = (entry_words if key_permute else entries)(head_dim, key_bits, key_product, device)
    value_table = (entry_words if value_permute else entries)(head_dim, value_bits, "float16", device)
    portable_kernel[(launch.num_workers, num_kv_heads * padded // launch.columns)](
        operand, factor, bias, views.key_codes, views.value_codes, views.key_scales, views.value_scales, block_table,
        seq_lens, seq_starts, query_start_loc, cu_tiles, key_table, value_table, partial, stats, batch, num_kv_heads,
        0 if block_table is None else block_table.stride(0),
        views.key_codes.stride(0), views.key_codes.stride(1), views.value_codes.stride(0), views.value_codes.stride(1),
        views.key_scales.stride(0), views.key_scales.stride(1),
        views.value_scales.stride(0), views.value_scales.stride(1), query_len, softcap,
        entry_unit(head_dim, key_bits, key_product),
        head_dim=head_dim, padded_octet=padded_octet(head_dim), key_bits=key_bits, value_bits=value_bits, group=group,
        num_columns=padded, columns=launch.columns, block_size=views.key_codes.shape[2], tile=launch.tile,
        window=window, has_softcap=softcap > 0, block_batch=padded_batch(batch), key_product=key_product,
        key_permute=key_permute, value_permute=value_permute, widen=interpreting(), overlap=launch.overlap,
        num_warps=launch.num_warps, **overlapped(launch),
    )  # fmt: skip
