"""Reading and writing the pages of one layer: the rows of a batch have equally many heads, and tokens at equal slots.

Pages are uint8 [num_blocks, batch_size * num_kv_heads, head_bytes] in core's layout: token t of every row is slot
t % BLOCK_SIZE of page t // BLOCK_SIZE. For core's operations that is one row of batch_size * num_kv_heads heads, which
is how tokens are written, or batch_size rows whose pages take turns, which is how they are attended to.

While torch.compile traces a model, each function is one operation that it takes as it is; see `traced`.
"""

from functools import lru_cache

import torch

from turboquant_core import KVCacheLayout, QuantizedTensor, TurboQuantConfig
from turboquant_core.ops import cache_update, decode_attention
from turboquant_hf.storage.codec import LayerCodec

BLOCK_SIZE = 64
# Coordinates dequantised at a time, in float32: what bounds the working set beside the result.
DEQUANTIZED_AT_ONCE = 1 << 22


@lru_cache
def page_layout(config: TurboQuantConfig, num_kv_heads: int) -> KVCacheLayout:
    """The layout of pages of that many heads."""
    return KVCacheLayout(config, num_kv_heads, BLOCK_SIZE)


def num_blocks(num_tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-num_tokens // BLOCK_SIZE)


def write(
    pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, codec: LayerCodec
) -> None:
    """Quantise keys and values and store them.

    Args:
        pages: Written in place.
        keys: [num_tokens, batch_size * num_kv_heads, head_dim].
        values: The same for values.
        slots: int64 [num_tokens]; negative ones are not stored.
        codec: The layer's.
    """
    layout = page_layout(codec.config, pages.shape[1])
    if codec.has_whole_bits:
        cache_update(keys, values, pages, slots, layout, key_transform=codec.key_transform)
        return
    stored_keys, stored_values = codec.quantize(keys, values)
    views = layout.views(pages)
    _put(views.key_codes, slots, stored_keys.codes)
    _put(views.key_scales, slots, stored_keys.scales)
    _put(views.value_codes, slots, stored_values.codes)
    _put(views.value_scales, slots, stored_values.scales)


def _put(field: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
    """Write [num_tokens, heads, n] into a field [blocks, heads, slots, n]; nothing is written at slots that are none.

    Which they are is not looked at, for a graph could not: in their place the first token is written again, and if it
    has no slot either, what is there already.
    """
    capacity = len(field) * BLOCK_SIZE
    written = (slots >= 0) & (slots < capacity)
    slots = torch.where(written, slots, slots[:1]).clamp(min=0, max=capacity - 1)
    new = torch.where(written[:, None, None], new, new[:1])
    at = (slots // BLOCK_SIZE, slice(None), slots % BLOCK_SIZE)
    field[at] = torch.where(written[:1], new, field[at])


def read(pages: torch.Tensor, count: int, codec: LayerCodec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first `count` pages, [batch_size * num_kv_heads, count * 64, head_dim]."""
    num_heads, head_dim = pages.shape[1], codec.config.head_dim
    views = page_layout(codec.config, num_heads).views(pages)
    shape = (num_heads, count * BLOCK_SIZE, head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=pages.device) for _ in range(2))
    step = max(1, DEQUANTIZED_AT_ONCE // (num_heads * BLOCK_SIZE * head_dim))
    for first in range(0, count, step):
        blocks = slice(first, min(first + step, count))

        def take(codes: torch.Tensor, scales: torch.Tensor, blocks: slice = blocks) -> QuantizedTensor:
            # [blocks, heads, slots, bytes] to [heads, tokens, bytes]
            return QuantizedTensor(*(x[blocks].transpose(0, 1).flatten(1, 2) for x in (codes, scales)))

        tokens = slice(first * BLOCK_SIZE, blocks.stop * BLOCK_SIZE)
        keys[:, tokens] = codec.dequantize_keys(take(views.key_codes, views.key_scales))
        values[:, tokens] = codec.dequantize_values(take(views.value_codes, views.value_scales))
    return keys, values


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    codec: LayerCodec,
    *,
    scale: float | None,
    seq_starts: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last stored tokens on the codes, which must be of whole bits.

    Args:
        query: [batch_size, num_heads, query_len, head_dim] of 1 to 8 tokens.
        pages: As everywhere.
        block_table: int32 [batch_size, num_blocks]: block j of row b is page j * batch_size + b.
        seq_lens: int32 [batch_size].
        codec: The layer's.
        scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
        seq_starts: int32 [batch_size], the first token of every row that may be seen; None for the first stored.
        window: Tokens that a token sees, itself included; None for all.
        softcap: Logits become softcap * tanh(logits / softcap).
        sinks: float32 [num_heads], a logit of each head that takes weight and gives no value.
        return_lse: Whether the log-sum-exp is needed.

    Returns:
        [batch_size, query_len, num_heads, head_dim], and the log-sum-exp of the logits float32 [batch_size, query_len,
        num_heads], or [0] where it is not needed.
    """
    batch_size, num_heads, query_len, head_dim = query.shape
    layout = page_layout(codec.config, pages.shape[1] // batch_size)
    # Softmax does not see the mean.
    sees_mean = return_lse or softcap or sinks is not None
    transform = codec.key_transform if sees_mean else codec.key_transform.without_mean()
    result = decode_attention(
        query.transpose(1, 2).reshape(-1, num_heads, head_dim),
        pages.view(-1, layout.num_kv_heads, layout.head_bytes),
        block_table,
        seq_lens,
        layout,
        scale=scale,
        seq_starts=seq_starts,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_transform=transform.map(lambda part: part.view(batch_size, -1, *part.shape[1:])),
        return_lse=return_lse,
    )
    output, lse = result if isinstance(result, tuple) else (result, query.new_empty(0, dtype=torch.float32))
    output = output.view(batch_size, query_len, num_heads, head_dim)
    return output, lse.view(batch_size, query_len, num_heads) if return_lse else lse
