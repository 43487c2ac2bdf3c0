"""Launch the kernel of `cache_gather`."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import codebook_tables
from turboquant_core.ops._bounds import row_capacity
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops._page_layout import page_layout
from turboquant_core.ops.cache_gather.kernel import gather_kernel
from turboquant_core.ops.cache_gather.output import empty_output

# Tokens of a program times their channels: what its registers hold.
BLOCK_ELEMENTS = 32 * 256
MAX_BLOCK_TOKENS = 32
# Rows are padded to a power of two, at least this: every size is another kernel to compile.
MIN_BLOCK_BATCH = 16


def launch(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    layout: KVCacheLayout,
    *,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    rotated_key_mean: torch.Tensor | None,
    key_dtype: torch.dtype,
    dtype: torch.dtype,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `cache_gather`, rotated."""
    keys, values = empty_output(pages, layout, key_dtype, dtype, max_tokens)
    batch, num_blocks = len(block_table), len(pages)
    capacity = row_capacity(num_blocks, block_table.shape[1], layout.block_size)
    if max_tokens == 0 or batch == 0 or capacity == 0:
        return keys, values
    compiled = page_layout(layout)
    key_centroids, value_centroids = (
        tuple(
            codebook_tables(group.num_channels, group.bits, pages.device, torch.float32).by_code
            for group in stored.groups
        )
        for stored in (layout.config.key_format, layout.config.value_format)
    )
    octet = padded_octet(compiled.head_dim)
    block_tokens = min(MAX_BLOCK_TOKENS, BLOCK_ELEMENTS // (8 * octet))
    # Triton launches on the current device, whatever the tensors' is. Its own next_power_of_2 and cdiv take the host
    # many times as long: they are functions of its compiler.
    with torch.cuda.device_of(pages):  # type: ignore[no-untyped-call]
        gather_kernel[(-(-max_tokens // block_tokens), layout.num_kv_heads)](
            out_keys=keys,
            out_values=values,
            pages=pages,
            block_table=block_table,
            cu_seqlens=cu_seqlens,
            starts=cu_seqlens if starts is None else starts.contiguous(),
            key_mean=key_centroids[0] if rotated_key_mean is None else rotated_key_mean,
            key_centroids=key_centroids,
            value_centroids=value_centroids,
            batch=batch,
            max_tokens=max_tokens,
            row_capacity=capacity,
            last_block=num_blocks - 1,
            table_row_stride=block_table.stride(0),
            table_column_stride=block_table.stride(1),
            page_stride=pages.stride(0),
            page_head_stride=pages.stride(1),
            layout=compiled,
            padded_octet=octet,
            has_starts=starts is not None,
            has_mean=rotated_key_mean is not None,
            block_batch=max(MIN_BLOCK_BATCH, 1 << (batch - 1).bit_length()),
            block_tokens=block_tokens,
        )
    return keys, values
