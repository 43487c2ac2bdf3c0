"""Everything that depends on the version of transformers."""

from typing import Any

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

# transformers 5.16 and 5.17 have no DummyLayer: layers without a cache are not in the list there.
EMPTY_LAYERS: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
"""The layer kind that stores nothing, because it reads another layer's cache."""

CACHE_ARGUMENT = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
"""How a model and `generate` take a cache; from transformers 5.24 on the other name gives a warning."""

HAS_FP8_CACHE = hasattr(cache_utils, "Fp8QuantizedLayer")
"""Whether `QuantizedCache` has the backend "fp8", as from transformers 5.21 on."""

KNOWN_LAYERS: tuple[type, ...] = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    LinearAttentionLayer,
    *EMPTY_LAYERS,
)
"""Layer kinds that are compressed, or stay as transformers made them: bounded by a window or a state, or empty."""

ENCODER_MODEL_TYPES = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
"""Model types that attend in both directions unless their configuration says `is_decoder`."""


def with_cache(cache: Cache) -> dict[str, Any]:
    """The keyword arguments by which a model reads and fills a cache."""
    return {CACHE_ARGUMENT: cache, "use_cache": True}


def gguf_weights_in_full() -> dict[str, Any]:
    """Arguments of `from_pretrained` that dequantise a GGUF file's weights once, when it is loaded."""
    # transformers 5.16 has no GgufConfig and always does so; from 5.17 on every forward would dequantise again.
    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def transformers_layers(config: PreTrainedConfig, max_length: int | None) -> list[object]:
    """The layers that `DynamicCache`, or with a max_length `StaticCache`, would use for a model."""
    if max_length is None:
        return list(DynamicCache(config=config).layers)
    return list(StaticCache(config=config, max_cache_len=max_length).layers)


__all__ = [
    "CACHE_ARGUMENT",
    "EMPTY_LAYERS",
    "ENCODER_MODEL_TYPES",
    "HAS_FP8_CACHE",
    "KNOWN_LAYERS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "PreTrainedConfig",
    "StaticLayer",
    "gguf_weights_in_full",
    "sdpa_attention_forward",
    "sdpa_mask",
    "transformers_layers",
    "with_cache",
]
