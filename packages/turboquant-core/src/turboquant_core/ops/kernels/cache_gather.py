"""`cache_gather` as one Triton kernel."""

import torch
import triton
import triton.language as tl

from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import codebook_tables
from turboquant_core.ops._bounds import row_capacity
from turboquant_core.ops.kernels.bounds import clamped, existing_block
from turboquant_core.ops.kernels.codes import channels, load_codes, load_scales
from turboquant_core.ops.kernels.split_rotation import padded_octet
from turboquant_core.ops.reference.cache_gather import empty_output

# Tokens of a program times their channels: what its registers hold.
BLOCK_ELEMENTS = 32 * 256
MAX_BLOCK_TOKENS = 32
# Rows are padded to a power of two, at least this: every size is another kernel to compile.
MIN_BLOCK_BATCH = 16


def cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    layout: KVCacheLayout,
    *,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    rotated_key_mean: torch.Tensor | None,
    dtype: torch.dtype,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `turboquant_core.ops.cache_gather.cache_gather`."""
    config = layout.config
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    keys, values = empty_output(pages, layout, dtype, max_tokens)
    batch, num_blocks = len(block_table), len(pages)
    capacity = row_capacity(num_blocks, block_table.shape[1], layout.block_size)
    if max_tokens == 0 or batch == 0 or capacity == 0:
        return keys, values
    key_centroids, value_centroids = (
        codebook_tables(config.head_dim, bits, pages.device, torch.float32)[0] for bits in (key_bits, value_bits)
    )
    octet = padded_octet(config.head_dim)
    block_tokens = min(MAX_BLOCK_TOKENS, BLOCK_ELEMENTS // (8 * octet))
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(pages):
        _gather_kernel[(triton.cdiv(max_tokens, block_tokens), layout.num_kv_heads)](
            keys,
            values,
            pages,
            block_table,
            cu_seqlens,
            cu_seqlens if starts is None else starts.contiguous(),
            key_centroids if rotated_key_mean is None else rotated_key_mean,
            key_centroids,
            value_centroids,
            batch,
            max_tokens,
            capacity,
            num_blocks - 1,
            block_table.stride(0),
            block_table.stride(1),
            pages.stride(0),
            pages.stride(1),
            num_kv_heads=layout.num_kv_heads,
            block_size=layout.block_size,
            head_dim=config.head_dim,
            padded_octet=octet,
            key_bits=key_bits,
            value_bits=value_bits,
            key_codes=layout.key_codes.offset,
            value_codes=layout.value_codes.offset,
            key_code_stride=layout.key_codes.slot_stride,
            value_code_stride=layout.value_codes.slot_stride,
            key_scales=layout.key_scales.offset,
            value_scales=layout.value_scales.offset,
            scale_stride=layout.key_scales.slot_stride,
            has_starts=starts is not None,
            has_mean=rotated_key_mean is not None,
            block_batch=max(MIN_BLOCK_BATCH, triton.next_power_of_2(batch)),
            block_tokens=block_tokens,
        )
    return keys, values


# A block table is as wide as the longest row may be, and where those that prefill begin in it is any entry.
@triton.jit(
    do_not_specialize=["batch", "max_tokens", "row_capacity", "last_block", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table", "cu_seqlens", "starts"],
)
def _gather_kernel(
    keys,
    values,
    pages,
    block_table,
    cu_seqlens,
    starts,
    key_mean,
    key_centroids,
    value_centroids,
    batch,
    max_tokens,
    row_capacity,  # the most stored tokens of a row
    last_block,
    table_row_stride,
    table_column_stride,
    page_stride,
    page_head_stride,
    num_kv_heads: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_octet: tl.constexpr,
    key_bits: tl.constexpr,
    value_bits: tl.constexpr,
    key_codes: tl.constexpr,
    value_codes: tl.constexpr,
    key_code_stride: tl.constexpr,
    value_code_stride: tl.constexpr,
    key_scales: tl.constexpr,
    value_scales: tl.constexpr,
    scale_stride: tl.constexpr,
    has_starts: tl.constexpr,
    has_mean: tl.constexpr,
    block_batch: tl.constexpr,
    block_tokens: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    head = tl.program_id(1).to(tl.int64)
    total = tl.load(cu_seqlens + batch)
    keep = token < tl.minimum(total, max_tokens)
    row = _row_of(token, cu_seqlens, batch, block_batch)
    position = token - tl.load(cu_seqlens + row, mask=keep, other=0)
    if has_starts:
        position += tl.maximum(tl.load(starts + row, mask=keep, other=0), 0)
    position = clamped(position, 0, row_capacity - 1)
    column = (position // block_size).to(tl.int64)
    block = tl.load(
        block_table + row.to(tl.int64) * table_row_stride + column * table_column_stride, mask=keep, other=0
    )
    head_rows = pages + existing_block(block, last_block).to(tl.int64) * page_stride + head * page_head_stride
    slot = position % block_size
    output = (token.to(tl.int64) * num_kv_heads + head) * head_dim
    _gather_tile(
        keys + output,
        head_rows + key_codes + slot * key_code_stride,
        head_rows + key_scales + slot * scale_stride,
        keep,
        key_centroids,
        key_mean + head * head_dim,
        head_dim,
        padded_octet,
        key_bits,
        has_mean,
        block_tokens,
    )
    _gather_tile(
        values + output,
        head_rows + value_codes + slot * value_code_stride,
        head_rows + value_scales + slot * scale_stride,
        keep,
        value_centroids,
        value_centroids,
        head_dim,
        padded_octet,
        value_bits,
        False,
        block_tokens,
    )


@triton.jit
def _row_of(token, cu_seqlens, batch, block_batch: tl.constexpr):
    """The row that each output token belongs to: how many rows end at or before it."""
    row = tl.arange(0, block_batch)
    ends = tl.load(cu_seqlens + 1 + row, mask=row < batch, other=2**31 - 1)
    return tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)


@triton.jit
def _gather_tile(
    output_rows,
    code_rows,
    scale_rows,
    keep,
    centroids,
    mean,
    head_dim: tl.constexpr,
    padded_octet: tl.constexpr,
    bits: tl.constexpr,
    has_mean: tl.constexpr,
    rows: tl.constexpr,
):
    codes = load_codes(code_rows, keep, bits, rows, head_dim // 8, padded_octet)
    scale = load_scales(scale_rows, keep)
    x = tl.load(centroids + codes) * scale[:, None]
    channel, real = channels(head_dim // 8, padded_octet)
    if has_mean:
        x += tl.load(mean + channel, mask=real, other=0)[None, :]
    mask = keep[:, None]
    if head_dim != 8 * padded_octet:
        mask = mask & real[None, :]
    tl.store(output_rows[:, None] + channel[None, :], x.to(output_rows.dtype.element_ty), mask=mask)
