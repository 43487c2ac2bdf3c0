"""The compressed layer that takes the place of each layer of transformers."""

import pytest
import torch

from turboquant_hf._compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from turboquant_hf.layers.build import compressed_layer
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.hybrid import TurboQuantHybridLayer, TurboQuantHybridSlidingLayer
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer
from turboquant_hf.layers.static import StaticWindowLayer, TurboQuantStaticLayer, TurboQuantStaticSlidingLayer

KINDS = [
    (DynamicLayer(), TurboQuantLayer),
    (DynamicSlidingWindowLayer(20), TurboQuantSlidingLayer),
    (LinearAttentionAndFullAttentionLayer(number_of_states=3), TurboQuantHybridLayer),
    (LinearAttentionAndSlidingWindowAttentionLayer(20, number_of_states=3), TurboQuantHybridSlidingLayer),
    (StaticLayer(50), TurboQuantStaticLayer),
    (StaticWindowLayer(50, 20), TurboQuantStaticSlidingLayer),
]


@pytest.mark.parametrize(("layer", "kind"), KINDS, ids=[kind.__name__ for _, kind in KINDS])
def test_a_layer_keeps_what_it_was_made_for(layer, kind):
    built = compressed_layer(layer, "tq2", {"sink_tokens": 2, "recent_tokens": 3, "value_bits": 3})
    assert type(built) is kind
    assert built.is_compileable == layer.is_compileable
    assert built.is_sliding == layer.is_sliding
    for name in ("sliding_window", "number_of_states"):
        assert getattr(built, name, None) == getattr(layer, name, None)
    assert built.get_max_length() == layer.get_max_length()
    assert (built.sink_tokens, built.recent_tokens) == (2, 3)
    built.update(*torch.randn(2, 1, 2, 10, 64))
    assert (built.config.key_bits, built.config.value_bits) == (2, 3)


def test_a_layer_without_keys_stays():
    layer = LinearAttentionLayer()
    assert compressed_layer(layer, "tq4", {}) is layer
