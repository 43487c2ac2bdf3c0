"""`cache_gather` as one Triton kernel."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.bounds import clamped, existing_block
from turboquant_core.ops._triton.codes import channels, load_codes, load_halves, load_scales


# A block table is as wide as the longest row may be, and where those that prefill begin in it is any entry.
@triton.jit(
    do_not_specialize=["batch", "max_tokens", "row_capacity", "last_block", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table", "cu_seqlens", "starts"],
)
def gather_kernel(
    out_keys,
    out_values,
    pages,
    block_table,
    cu_seqlens,
    starts,
    key_mean,
    key_centroids,  # a tensor float32 [2^bits] in the order of codes for each group of channels, like the next
    value_centroids,
    batch,
    max_tokens,
    row_capacity,  # the most stored tokens of a row
    last_block,
    table_row_stride,
    table_column_stride,
    page_stride,
    page_head_stride,
    layout: tl.constexpr,
    padded_octet: tl.constexpr,
    has_starts: tl.constexpr,
    has_mean: tl.constexpr,
    block_batch: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """One program for some tokens of the output and a KV head."""
    # Triton 3.6 takes no field of a constant tuple as an argument.
    keys: tl.constexpr = layout.stored_keys
    values: tl.constexpr = layout.stored_values
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    head = tl.program_id(1).to(tl.int64)
    total = tl.load(cu_seqlens + batch)
    keep = token < tl.minimum(total, max_tokens)
    row = _row_of(token, cu_seqlens, batch, block_batch)
    position = token - tl.load(cu_seqlens + row, mask=keep, other=0)
    if has_starts:
        position += tl.maximum(tl.load(starts + row, mask=keep, other=0), 0)
    position = clamped(position, 0, row_capacity - 1)
    column = (position // layout.block_size).to(tl.int64)
    block = tl.load(
        block_table + row.to(tl.int64) * table_row_stride + column * table_column_stride, mask=keep, other=0
    )
    head_rows = pages + existing_block(block, last_block).to(tl.int64) * page_stride + head * page_head_stride
    slot = position % layout.block_size
    output = (token.to(tl.int64) * layout.num_kv_heads + head) * layout.head_dim
    mean = key_mean + head * layout.head_dim
    _gather_tile(
        out_keys + output, head_rows, slot, keep, key_centroids, mean,
        keys, layout.head_dim, padded_octet, has_mean,
    )  # fmt: skip
    _gather_tile(
        out_values + output, head_rows, slot, keep, value_centroids, mean,
        values, layout.head_dim, padded_octet, False,
    )  # fmt: skip


@triton.jit
def _row_of(token, cu_seqlens, batch, block_batch: tl.constexpr):
    """The row that each output token belongs to: how many rows end at or before it."""
    row = tl.arange(0, block_batch)
    ends = tl.load(cu_seqlens + 1 + row, mask=row < batch, other=2**31 - 1)
    return tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)


@triton.jit
def _gather_tile(
    output_rows, head_rows, slot, keep, centroids, mean,
    stored: tl.constexpr, head_dim: tl.constexpr, padded_octet: tl.constexpr, has_mean: tl.constexpr,
):  # fmt: skip
    """Write what is stored at every slot of a row's head."""
    code_rows = head_rows + stored.codes + slot * stored.code_stride
    scale_rows = head_rows + stored.scales + slot * stored.scale_stride
    if stored.split:
        half: tl.constexpr = head_dim // 2
        first, second = load_halves(code_rows, keep, stored.bits, slot.shape[0], half // 8, padded_octet // 2)
        _write_channels(output_rows, first, scale_rows, keep, centroids[0], mean, half, padded_octet // 2, has_mean)
        _write_channels(
            output_rows + half, second, scale_rows + 2, keep, centroids[1], mean + half, half, padded_octet // 2,
            has_mean,
        )  # fmt: skip
    else:
        codes = load_codes(code_rows, keep, stored.bits, slot.shape[0], head_dim // 8, padded_octet)
        _write_channels(output_rows, codes, scale_rows, keep, centroids[0], mean, head_dim, padded_octet, has_mean)


@triton.jit
def _write_channels(
    output_rows, codes, scale_rows, keep, centroids, mean,
    head_dim: tl.constexpr, padded_octet: tl.constexpr, has_mean: tl.constexpr,
):  # fmt: skip
    """Write `head_dim` channels of codes with one scale each row."""
    x = tl.load(centroids + codes) * load_scales(scale_rows, keep)[:, None]
    channel, real = channels(head_dim // 8, padded_octet)
    if has_mean:
        x += tl.load(mean + channel, mask=real, other=0)[None, :]
    mask = keep[:, None]
    if head_dim != 8 * padded_octet:
        mask = mask & real[None, :]
    tl.store(output_rows[:, None] + channel[None, :], x.to(output_rows.dtype.element_ty), mask=mask)
