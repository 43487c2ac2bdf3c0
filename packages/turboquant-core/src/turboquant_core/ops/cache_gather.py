"""Dequantise tokens of the paged cache into dense tensors."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._dispatch import (
    Path,
    check_one_device,
    check_pages,
    check_tensor,
    check_vector_dtype,
    check_whole_bits,
    runs_triton,
)
from turboquant_core.ops.reference.cache_gather import cache_gather as reference_cache_gather
from turboquant_core.rotation import Rotation


def cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: KVCacheLayout,
    *,
    starts: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_mean: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_tokens: int,
    path: Path = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens starts[b] to seq_lens[b] - 1 of every row b, dequantised but still rotated, one row after another.

    A vector is t * c[codes], which is Πx̂: its product with a rotated query is that of x̂ with the query. Nothing waits
    for the device: `max_tokens` bounds the workspace instead.

    Args:
        pages: uint8 [num_blocks, num_kv_heads, head_bytes]. Dimensions 0 and 1 may be strided.
        block_table: int32 [batch, max_blocks], the block of every block_size tokens; any row stride.
        seq_lens: int32 [batch].
        layout: Where a slot's bytes lie. Its bits must be whole.
        starts: int32 [batch], the first token of every row, not negative; None for 0.
        cu_seqlens: int32 [batch + 1], as `cumulative_lengths` gives them, for who gathers from many layers; None to
            compute them.
        key_mean: float32 [num_kv_heads, head_dim], as it was subtracted from keys: added back, rotated, before they are
            rounded. None to leave keys without it.
        dtype: float16, bfloat16 or float32.
        max_tokens: Tokens in the output. Those past it are not written, though `cu_seqlens` counts them.
        path: "triton", "reference", or "auto" for Triton on CUDA and the reference elsewhere.

    Returns:
        Keys and values, [max_tokens, num_kv_heads, head_dim] in `dtype`, uninitialised past the last token, and
        cu_seqlens, int32 [batch + 1]: row b is cu_seqlens[b] to cu_seqlens[b + 1] - 1.

    Raises:
        ValueError: If a type, shape, stride or device does not fit, bits are fractional, or the path cannot run.
    """
    check_whole_bits(layout)
    check_pages(pages, layout)
    check_tensor("block_table", block_table, torch.int32, (-1, -1))
    batch = block_table.shape[0]
    check_tensor("seq_lens", seq_lens, torch.int32, (batch,))
    if starts is not None:
        check_tensor("starts", starts, torch.int32, (batch,))
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, torch.int32, (batch + 1,))
    if key_mean is not None:
        check_tensor("key_mean", key_mean, torch.float32, (layout.num_kv_heads, layout.config.head_dim))
    check_vector_dtype("dtype", dtype)
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; it must not be negative")
    check_one_device(
        {
            "pages": pages,
            "block_table": block_table,
            "seq_lens": seq_lens,
            "starts": starts,
            "cu_seqlens": cu_seqlens,
            "key_mean": key_mean,
        }
    )
    if cu_seqlens is None:
        cu_seqlens = cumulative_lengths(seq_lens, starts)
    if key_mean is not None:
        key_mean = Rotation(layout.config.head_dim).rotate(key_mean)
    if runs_triton(path, pages.device):
        from turboquant_core.ops.kernels.cache_gather import cache_gather as gather
    else:
        gather = reference_cache_gather
    keys, values = gather(
        pages,
        block_table,
        layout,
        starts=starts,
        cu_seqlens=cu_seqlens,
        rotated_key_mean=key_mean,
        dtype=dtype,
        max_tokens=max_tokens,
    )
    return keys, values, cu_seqlens


def cumulative_lengths(seq_lens: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Where every row begins in what `cache_gather` gives, and the total, int32 [batch + 1]; computed on the device."""
    lengths = seq_lens if starts is None else seq_lens - starts
    ends = lengths.clamp(min=0).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))
