"""What `cache_gather` writes."""

import torch

from turboquant_core.layout import KVCacheLayout


def empty_output(
    pages: torch.Tensor, layout: KVCacheLayout, key_dtype: torch.dtype, dtype: torch.dtype, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised keys and values, [max_tokens, num_kv_heads, head_dim]."""
    shape = (max_tokens, layout.num_kv_heads, layout.config.head_dim)
    return (
        torch.empty(shape, dtype=key_dtype, device=pages.device),
        torch.empty(shape, dtype=dtype, device=pages.device),
    )
