"""The memory that prefill dequantises into: how much it is, and what a profile run takes for it."""

import torch

# Dequantised keys and values of a part take at most so many bytes for every token that a batch may have: less than the
# MLP takes of most models, so that the cache loses nothing by it.
WORKSPACE_BYTES_PER_TOKEN = 64 * 1024
# Stored tokens of a part: more for every token of a batch, or more in all, would save launches only.
MOST_STORED_PER_TOKEN = 16
MOST_WORKSPACE_TOKENS = 128 * 1024


def workspace_tokens(max_num_batched_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """How many stored tokens are dequantised at a time."""
    stored_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
    per_token = min(MOST_STORED_PER_TOKEN, max(1, WORKSPACE_BYTES_PER_TOKEN // stored_bytes))
    return min(MOST_WORKSPACE_TOKENS, per_token * max_num_batched_tokens)


def take_workspace(query: torch.Tensor, num_kv_heads: int, num_stored: int, *, restores_keys: bool = False) -> None:
    """Allocate what prefill takes at most, and let go of it, for a profile run to see.

    Args:
        query: [num_tokens, num_heads, head_dim] of the largest batch.
        num_kv_heads: KV heads.
        num_stored: Stored tokens that are dequantised at a time.
        restores_keys: Whether keys go through more than a mean, which is undone in float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    # Keys and values of a part, and keys less their mean.
    workspace = [query.new_empty(length, num_kv_heads, head_dim) for length in (num_stored, num_stored, num_tokens)]
    if restores_keys:
        workspace += [query.new_empty(num_stored, num_kv_heads, head_dim, dtype=torch.float32) for _ in range(2)]
    # The rotated query, and outputs: on own tokens, on the parts so far, and on another part.
    workspace += [torch.empty_like(query) for _ in range(4)]
    workspace += [query.new_empty(num_heads, num_tokens, dtype=torch.float32) for _ in range(3)]
    del workspace
