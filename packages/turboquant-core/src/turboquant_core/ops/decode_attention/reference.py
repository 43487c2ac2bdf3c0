"""Attention on stored codes, one row after another."""

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import existing_blocks, row_capacity
from turboquant_core.quantized import QuantizedTensor
from turboquant_core.split import quantizer_of
from turboquant_core.vector_format import VectorFormat


def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: KVCacheLayout,
    *,
    scale: float,
    query_len: int | None = None,
    query_start_loc: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
    seq_ends: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    key_transform: KeyTransform = IDENTITY,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels compute, in float32, or float64 for a float64 query.

    Args:
        query: As in `turboquant_core.ops.decode_attention`, or float64.
        pages: As in the operation, like all that is not said here.
        block_table: The same.
        seq_lens: The same.
        layout: The same.
        scale: What logits are multiplied with.
        query_len: The most query tokens of a row; None for as many as there are.
        query_start_loc: The same as in the operation.
        seq_starts: The same.
        seq_ends: The same.
        window: Positions that a token sees; 0 for all.
        softcap: The bound of logits; 0 for none.
        sinks: The same as in the operation.
        key_transform: The same.

    Returns:
        The output like `query` and its log-sum-exp [num_tokens, num_heads], both in the type of the arithmetic.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    num_tokens, num_heads, head_dim = query.shape
    batch = len(seq_lens)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full((num_tokens, num_heads), -torch.inf, dtype=dtype, device=query.device)
    each = num_tokens // max(batch, 1) if query_len is None else query_len
    starts, most = [row * each for row in range(batch + 1)], each
    if query_start_loc is not None:
        starts = query_start_loc.clamp(0, num_tokens).tolist()
        most = num_tokens if query_len is None else query_len
    capacity = row_capacity(len(pages), 1 if block_table is None else block_table.shape[1], layout.block_size)
    lengths = seq_lens.clamp(0, capacity)
    ends = lengths if seq_ends is None else seq_ends.clamp(min=0).minimum(lengths)
    for row, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
        row_len = min(max(starts[row + 1] - starts[row], 0), most)
        tokens = slice(starts[row], starts[row] + row_len)
        if row_len == 0 or (end == 0 and sinks is None):
            continue
        keys, values = stored_row(pages, block_table, row, end, layout, dtype)
        keys = key_transform.of_row(row).restored(keys.transpose(0, 1)).transpose(0, 1)
        # The heads of a KV head are rows of one product.
        num_kv_heads, num_rows = keys.shape[0], num_heads // keys.shape[0] * row_len
        grouped = query[tokens].to(dtype).transpose(0, 1).reshape(num_kv_heads, num_rows, head_dim)
        logits = (grouped @ keys.transpose(1, 2)).view(num_heads, row_len, end) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        position = torch.arange(end, device=query.device)
        seen_by = length - row_len + torch.arange(row_len, device=query.device)[:, None]
        seen = position <= seen_by
        if window:
            seen &= position > seen_by - window
        if seq_starts is not None:
            seen &= position >= seq_starts[row]
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, row_len, 1)
            logits = torch.cat([logits, sink], dim=-1)
        row_lse = logits.logsumexp(-1)
        # Where nothing is seen every weight is zero.
        weights = logits.softmax(-1).masked_fill(row_lse.isneginf()[..., None], 0.0)[..., :end]
        attended = (weights.reshape(num_kv_heads, num_rows, end) @ values).view(num_heads, row_len, head_dim)
        # A sink that is NaN or infinite leaves no number, also where there is no key.
        attended = attended.masked_fill(~(row_lse < torch.inf)[..., None], torch.nan)
        out[tokens] = attended.transpose(0, 1)
        lse[tokens] = row_lse.transpose(0, 1)
    return out, lse


def stored_row(
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    row: int,
    length: int,
    layout: KVCacheLayout,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dequantised keys and values of one row, [num_kv_heads, length, head_dim]; keys as they are stored."""
    config, views = layout.config, layout.views(pages)
    if block_table is None:
        blocks = torch.tensor([row], device=pages.device)
    else:
        blocks = existing_blocks(block_table[row, : -(-length // layout.block_size)], len(pages))

    def take(plane: torch.Tensor) -> torch.Tensor:
        return plane[blocks].transpose(0, 1).flatten(1, 2)[:, :length]

    def read(codes: torch.Tensor, scales: torch.Tensor, stored: VectorFormat) -> torch.Tensor:
        quantizer = quantizer_of(stored)
        unit = quantizer.dequantize_rotated(QuantizedTensor(codes, torch.ones_like(scales))).to(dtype)
        # The stored root is exact in any type; squaring it in float32 is not.
        by_channel = scales.to(dtype).square().repeat_interleave(config.head_dim // stored.num_scales, dim=-1)
        return quantizer.rotation.unrotate(unit * by_channel)

    keys = read(take(views.key_codes), take(views.key_scales), config.key_format)
    values = read(take(views.value_codes), take(views.value_scales), config.value_format)
    return keys, values
