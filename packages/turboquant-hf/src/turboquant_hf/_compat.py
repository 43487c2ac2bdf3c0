"""Everything that depends on the version of transformers."""

import inspect
import sys
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
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

# transformers 5.16 and 5.17 have no DummyLayer: layers without a cache are not in the list there.
EMPTY_LAYERS: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
"""The layer kind that stores nothing, because it reads another layer's cache."""

CACHE_ARGUMENT = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
"""How a model and `generate` take a cache; from transformers 5.24 on the other name gives a warning."""

_OWN_CODE = "does not attend through transformers' AttentionInterface"
_CHOSEN = "gives other attentions than eager and sdpa the tokens that its indexer chooses, in place of a mask"
CODES_NOT_READ = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"), _CHOSEN),
    "bigbird_pegasus": "says that its self-attention is not causal",
    "cpmant": _OWN_CODE,
    "diffllama": "splits values after it has stored them",
    "doge": "makes a mask from the values that it has stored",
    "git": _OWN_CODE,
    "inkling2_text": "has a sink for every token",
    "jetmoe": "repeats keys and values after it has stored them",
}
"""Model types that transformers lets name any attention and that still cannot attend on codes, each with the reason."""

KV_HEADS_DOUBLED_IN_WINDOWS = frozenset({"mimo_v2_flash"})
"""Model types whose layers with a window have twice the KV heads that their configuration names."""

HAS_FP8_CACHE = hasattr(cache_utils, "Fp8QuantizedLayer")
"""Whether `QuantizedCache` has the backend "fp8", as from transformers 5.21 on."""

HYBRID_LAYERS: tuple[type, ...] = (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Layers with the keys and values of attention and the state of linear attention in one."""

KNOWN_LAYERS: tuple[type, ...] = (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    LinearAttentionLayer,
    *HYBRID_LAYERS,
    *EMPTY_LAYERS,
)
"""Layer kinds that are compressed, or stay as transformers made them: bounded by a window or a state, or empty."""

ENCODER_MODEL_TYPES = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
"""Model types that attend in both directions unless their configuration says `is_decoder`."""


def with_cache(cache: Cache) -> dict[str, Any]:
    """The keyword arguments by which a model reads and fills a cache."""
    return {CACHE_ARGUMENT: cache, "use_cache": True}


def forget_tokens(layer: CacheLayerMixin) -> None:
    """Drop the tokens of a growing layer that was reset: transformers 5.16 zeroes them, and keeps their number."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.keys = layer.values = None
        layer.is_initialized = False


def decoder_class(config: PreTrainedConfig) -> Any:
    """The class that transformers has for a decoder, or for the text model of one; None where it knows neither."""
    for each, mapping in (
        (config, MODEL_FOR_CAUSAL_LM_MAPPING),
        (config.get_text_config(decoder=True), MODEL_FOR_CAUSAL_LM_MAPPING),
        (config.get_text_config(decoder=True), MODEL_MAPPING),
    ):
        try:
            found = mapping.get(type(each), None)
        except ImportError:
            # Its module needs a package that is not installed, without which there is no such model either.
            continue
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    return None


def masks_windows(config: PreTrainedConfig) -> bool:
    """Whether the masks of a model know of its windows; Moshi leaves them to a cache that forgets."""
    model = decoder_class(config)
    known = () if model is None else vars(sys.modules[model.__module__])
    return "create_sliding_window_causal_mask" in known or "create_chunked_causal_mask" in known


def takes_dynamic_cache(config: PreTrainedConfig) -> bool:
    """Whether the model of a configuration keeps its keys and values in a `DynamicCache`; so for one not known."""
    model = decoder_class(config)
    if model is None:
        return True
    # A cache of its own, or a state that no cache holds.
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return False
    parameters = inspect.signature(model.forward).parameters
    taken = [parameters[name] for name in ("past_key_values", "cache_params", "cache") if name in parameters]
    # XLM has had a dict of that name for long.
    return any("dict" not in str(parameter.annotation) for parameter in taken)


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
    "CODES_NOT_READ",
    "EMPTY_LAYERS",
    "ENCODER_MODEL_TYPES",
    "HAS_FP8_CACHE",
    "HYBRID_LAYERS",
    "KNOWN_LAYERS",
    "KV_HEADS_DOUBLED_IN_WINDOWS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "PreTrainedConfig",
    "StaticIndexedLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "decoder_class",
    "gguf_weights_in_full",
    "masks_windows",
    "sdpa_attention_forward",
    "sdpa_mask",
    "takes_dynamic_cache",
    "transformers_layers",
    "with_cache",
]
