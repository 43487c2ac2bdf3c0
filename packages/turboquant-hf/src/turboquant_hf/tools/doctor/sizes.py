"""Bytes of a token in every cache."""

from dataclasses import replace
from functools import cache

from turboquant_core import PRESETS, KVCacheLayout, TurboQuantConfig
from turboquant_core.vector_format import can_split
from turboquant_core.vllm_limits import BLOCK_SIZE_MULTIPLE

UNCOMPRESSED_ITEMSIZES = {"bf16": 2, "fp8": 1}
CACHES = (*UNCOMPRESSED_ITEMSIZES, *PRESETS)
"""Names of caches: bf16, fp8, and every preset."""


def has_whole_bits(preset: str) -> bool:
    """Whether kernels read the preset's codes."""
    # Any head_dim tells.
    return TurboQuantConfig.preset(preset, 128).has_kernels


@cache
def token_bytes(
    cache: str, num_kv_heads: int, head_dim: int, split: bool = False, *, value_head_dim: int | None = None
) -> int:
    """Bytes of one token's keys and values in one layer.

    Args:
        cache: One of `CACHES`.
        num_kv_heads: Heads of them.
        head_dim: Dimension of a key.
        split: Whether keys are split, if they can be.
        value_head_dim: Dimension of a value; None for that of a key.

    Raises:
        ValueError: If there is no such preset, or it does not store vectors of that size.
    """
    if cache in UNCOMPRESSED_ITEMSIZES:
        return num_kv_heads * (head_dim + (value_head_dim or head_dim)) * UNCOMPRESSED_ITEMSIZES[cache]
    config = TurboQuantConfig.preset(cache, head_dim, value_head_dim=value_head_dim)
    config = replace(config, key_split=split and can_split(head_dim, config.key_bits))
    layout = KVCacheLayout(config, num_kv_heads, BLOCK_SIZE_MULTIPLE)
    return layout.page_bytes // layout.block_size
