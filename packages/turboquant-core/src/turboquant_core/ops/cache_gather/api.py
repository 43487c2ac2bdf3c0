"""Dequantise tokens of the paged cache into dense tensors."""

import torch

from turboquant_core._checks import check_int
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import MAX_TOKENS, row_capacity
from turboquant_core.ops._dispatch import (
    check_has_kernels,
    check_is_key_transform,
    check_key_transform,
    check_one_device,
    check_pages,
    check_tensor,
    check_vector_dtype,
    not_traced,
)
from turboquant_core.ops._values import checks_values
from turboquant_core.ops.cache_gather.paths import choose_path
from turboquant_core.ops.cache_gather.reference import cache_gather as reference_cache_gather
from turboquant_core.ops.cache_gather.values import check_gathered_values
from turboquant_core.rotation import Rotation
from turboquant_core.split import quantizer_of


@not_traced
def cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: KVCacheLayout,
    *,
    starts: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_transform: KeyTransform = IDENTITY,
    dtype: torch.dtype = torch.bfloat16,
    max_tokens: int,
    path: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens starts[b] to seq_lens[b] - 1 of every row b, dequantised but still rotated, one row after another.

    A vector is t * c[codes], which is Πx̂: its product with a rotated query is that of x̂ with the query. Nothing waits
    for the device: `max_tokens` bounds the workspace instead.

    Values of tensors are not read back to be checked. Whatever they are, nothing outside the pages is read and nothing
    outside the output written: a block outside the pages is read as the last one, and positions are at least 0
    and end where a row's blocks do. Set TURBOQUANT_CHECK_VALUES=1 to have such values refused by name.

    Args:
        pages: uint8 [num_blocks, num_kv_heads, head_bytes]. Dimensions 0 and 1 may be strided.
        block_table: int32 [batch, max_blocks], the block of every block_size tokens; any row stride.
        seq_lens: int32 [batch].
        layout: Where a slot's bytes lie. Its bits must be whole.
        starts: int32 [batch], the first token of every row; None for 0.
        cu_seqlens: int32 [batch + 1], as `cumulative_lengths` gives them, for who gathers from many layers; None to
            compute them.
        key_transform: What keys went through before they were stored, of tensors without rows: undone before they are
            rounded. A scale or an order takes a workspace of float32.
        dtype: float16, bfloat16 or float32.
        max_tokens: Tokens in the output. Those past it are not written, though `cu_seqlens` counts them.
        path: A name of `turboquant_core.ops.cache_gather.paths`; "auto" is the fastest that can run.

    Returns:
        Keys and values, [max_tokens, num_kv_heads, head_dim] in `dtype`, uninitialised past the last token, and
        cu_seqlens, int32 [batch + 1]: row b is cu_seqlens[b] to cu_seqlens[b + 1] - 1.

    Raises:
        TypeError: If `key_transform` is none.
        ValueError: If a type, shape, stride or device does not fit, bits are fractional, or the path cannot run.
    """
    check_is_key_transform(key_transform)
    check_has_kernels(layout)
    check_pages(pages, layout)
    check_tensor("block_table", block_table, torch.int32, (-1, -1))
    batch = block_table.shape[0]
    check_tensor("seq_lens", seq_lens, torch.int32, (batch,))
    if starts is not None:
        check_tensor("starts", starts, torch.int32, (batch,))
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, torch.int32, (batch + 1,))
    transform = key_transform.tensors()
    check_key_transform(transform, layout)
    check_vector_dtype("dtype", dtype)
    max_tokens = check_int("max_tokens", max_tokens, 0, MAX_TOKENS)
    check_one_device(
        {
            "pages": pages,
            "block_table": block_table,
            "seq_lens": seq_lens,
            "starts": starts,
            "cu_seqlens": cu_seqlens,
            **transform,
        }
    )
    if checks_values():
        check_gathered_values(block_table, seq_lens, starts, cu_seqlens, layout, len(pages))
    if cu_seqlens is None:
        cu_seqlens = cumulative_lengths(
            seq_lens, starts, row_capacity(len(pages), block_table.shape[1], layout.block_size)
        )
    # What is stored is turned into what is gathered in one product, before it is rounded.
    as_stored = key_transform.only_centres and not layout.config.key_split
    mean = key_transform.mean
    rotated_mean = None if mean is None else Rotation(layout.config.head_dim).rotate(mean)
    if choose_path(path, layout, pages.device) is not None:
        from turboquant_core.ops.cache_gather.launch import launch as gather
    else:
        gather = reference_cache_gather
    keys, values = gather(
        pages,
        block_table,
        layout,
        starts=starts,
        cu_seqlens=cu_seqlens,
        rotated_key_mean=rotated_mean if as_stored else None,
        key_dtype=dtype if as_stored else torch.float32,
        dtype=dtype,
        max_tokens=max_tokens,
    )
    if not as_stored:
        keys = torch.einsum("thi,ihj->thj", keys, _restoring(layout, key_transform, pages.device))
        keys = (keys if rotated_mean is None else keys.add_(rotated_mean)).to(dtype)
    return keys, values, cu_seqlens


def _restoring(layout: KVCacheLayout, key_transform: KeyTransform, device: torch.device) -> torch.Tensor:
    """What each stored coordinate is in rotated keys, float32 [head_dim, num_kv_heads, head_dim]."""
    config = layout.config
    unit = torch.eye(config.head_dim, device=device)[:, None].repeat(1, layout.num_kv_heads, 1)
    keys = key_transform.without_mean().restored(quantizer_of(config.key_format).rotation.unrotate(unit))
    return Rotation(config.head_dim).rotate(keys)


def cumulative_lengths(
    seq_lens: torch.Tensor, starts: torch.Tensor | None = None, capacity: int = MAX_TOKENS
) -> torch.Tensor:
    """Where every row begins in what `cache_gather` gives, and the total, int32 [batch + 1]; computed on the device.

    Lengths count as at most `capacity`, the most stored tokens of a row.
    """
    lengths = seq_lens.clamp(0, capacity)
    if starts is not None:
        lengths = (lengths - starts.clamp(min=0)).clamp(min=0)
    ends = lengths.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))
