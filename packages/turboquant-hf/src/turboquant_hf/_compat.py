"""Everything that depends on the version of transformers."""

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers 5.16 and 5.17 leave layers without a cache out of the list
    DummyLayer = None

NATIVE_LAYERS = tuple(
    kind for kind in (DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer) if kind
)
"""Layer kinds that stay as transformers made them: bounded by a window or a state, or empty."""


def dynamic_layers(config: PreTrainedConfig) -> list[object]:
    """The layers that `DynamicCache` would use for a model."""
    return list(DynamicCache(config=config).layers)


__all__ = ["NATIVE_LAYERS", "Cache", "CacheLayerMixin", "DynamicLayer", "PreTrainedConfig", "dynamic_layers"]
