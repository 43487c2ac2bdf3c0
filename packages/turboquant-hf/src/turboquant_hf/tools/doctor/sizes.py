"""Bytes of a token in every cache."""

from dataclasses import replace
from functools import cache

from turboquant_core import PRESETS, KVCacheLayout, TurboQuantConfig
from turboquant_core.vector_format import can_split
from turboquant_core.vllm_limits import BLOCK_SIZE_MULTIPLE
from turboquant_hf.storage import codec

UNCOMPRESSED_ITEMSIZES = {"bf16": 2, "fp8": 1}
CACHES = (*UNCOMPRESSED_ITEMSIZES, *PRESETS)
"""Names of caches: bf16, fp8, and every preset."""


def has_whole_bits(preset: str) -> bool:
    """Whether kernels read the preset's codes."""
    # Any head_dim tells.
    return codec.has_whole_bits(TurboQuantConfig.preset(preset, 128))


@cache
def token_bytes(cache: str, num_kv_heads: int, head_dim: int, split: bool = False) -> int:
    """Bytes of one token's keys and values in one layer; of keys that are split, if they are to be and can be.

    Raises:
        ValueError: If there is no such preset, or it does not store vectors of that size.
    """
    if cache in UNCOMPRESSED_ITEMSIZES:
        return 2 * num_kv_heads * head_dim * UNCOMPRESSED_ITEMSIZES[cache]
    config = TurboQuantConfig.preset(cache, head_dim)
    config = replace(config, key_split=split and can_split(head_dim, config.key_bits))
    layout = KVCacheLayout(config, num_kv_heads, BLOCK_SIZE_MULTIPLE)
    return layout.page_bytes // layout.block_size
