"""What code that was written for `DynamicCache` asks of a cache."""

import re

import numpy as np
import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from turboquant_hf import TurboQuantCache

WINDOW = 16
EXACT = {"key_bits": 8, "value_bits": 8}


@pytest.fixture(scope="module")
def mistral(tiny_config):
    torch.manual_seed(3)
    return MistralForCausalLM(tiny_config(MistralConfig, sliding_window=WINDOW)).eval()


def ids(num_tokens, batch_size=2):
    return torch.randint(1, 1500, (batch_size, num_tokens), generator=torch.Generator().manual_seed(num_tokens))


def filled(model, *caches, sizes=(24, 1, 3)):
    with torch.no_grad():
        for cache in caches:
            for size in sizes:
                model(ids(size), past_key_values=cache)
    return caches


def difference(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@pytest.mark.parametrize("options", [{}, {"max_length": 70}, {"sink_tokens": 0, "recent_tokens": 0}], ids=str)
def test_keys_and_values_are_dequantised_at_each_look(tiny_model, attention, options):
    tiny_model.set_attn_implementation(attention)
    cache, expected = filled(
        tiny_model, TurboQuantCache(tiny_model.config, **EXACT, **options), DynamicCache(config=tiny_model.config)
    )
    tiny_model.set_attn_implementation("sdpa")
    before = cache.nbytes
    for (keys, values, window), (wanted_keys, wanted_values, _) in zip(cache, expected, strict=True):
        assert difference(keys, wanted_keys) < 0.02
        assert difference(values, wanted_values) < 0.02
        assert window is None
    assert cache.nbytes == before
    assert len(cache) == 2


def test_a_window_gives_what_the_next_token_sees(mistral):
    cache, expected = filled(mistral, TurboQuantCache(mistral.config, **EXACT), DynamicCache(config=mistral.config))
    for (keys, values, window), (wanted_keys, wanted_values, wanted_window) in zip(cache, expected, strict=True):
        assert difference(keys, wanted_keys) < 0.02
        assert difference(values, wanted_values) < 0.02
        assert torch.equal(window, wanted_window)
        assert keys.shape[2] == WINDOW - 1


def test_a_layer_without_tokens_has_no_keys(tiny_model):
    cache = TurboQuantCache(tiny_model.config)
    assert cache.layers[0].keys is None
    assert cache.layers[0].values is None
    filled(tiny_model, cache)
    cache.reset()
    assert cache.layers[0].keys is None


@pytest.mark.parametrize("name", ["keys", "values"])
def test_keys_cannot_be_put_in_by_hand(tiny_model, name):
    (cache,) = filled(tiny_model, TurboQuantCache(tiny_model.config))
    with pytest.raises(AttributeError, match=rf"{name} of a TurboQuantLayer cannot be set.*update"):
        setattr(cache.layers[0], name, torch.zeros(2, 2, 28, 64))


INDICES = {
    "list": [2, 0],
    "tuple": (0, 2),
    "negative": [-1],
    "bools": [True, False, True],
    "numpy": np.array([1, 1, 0]),
    "numpy, bool": np.array([False, True, True]),
    "tensor": torch.tensor([2, 1]),
    "tensor, bool": torch.tensor([False, False, True]),
    "slice": slice(1, None),
}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_rows_are_picked_as_a_dynamic_cache_picks_them(tiny_model, indices):
    caches = (TurboQuantCache(tiny_model.config, **EXACT), DynamicCache(config=tiny_model.config))
    with torch.no_grad():
        for cache in caches:
            tiny_model(ids(12, batch_size=3), past_key_values=cache)
            cache.batch_select_indices(indices)
    for layer, expected in zip(*(cache.layers for cache in caches), strict=True):
        assert difference(layer.keys, expected.keys) < 0.02


@pytest.mark.parametrize("indices", [[3], (0, -4), torch.tensor([7])], ids=str)
def test_rows_that_do_not_exist_are_refused_and_nothing_is_lost(tiny_model, indices):
    (cache,) = filled(tiny_model, TurboQuantCache(tiny_model.config))
    with pytest.raises(IndexError):
        cache.batch_select_indices(indices)
    filled(tiny_model, cache, sizes=[1])
    assert cache.batch_size == 2


NO_ROWS = {
    "indices": [([], "indices is []"), ([False, False], r"indices is [False, False]"), (slice(0), "indices is slice")],
    "repeats": [(0, "repeats is 0"), (torch.tensor([0, 0]), "repeats is [0, 0]")],
    "beam_idx": [(torch.tensor([], dtype=torch.int64), "beam_idx is []")],
}
OPERATIONS = {"indices": "batch_select_indices", "repeats": "batch_repeat_interleave", "beam_idx": "reorder_cache"}


@pytest.mark.parametrize("skip_layers", [(), (0,)], ids=["", "skip"])
@pytest.mark.parametrize(
    ("name", "given", "said"), [(name, *case) for name, cases in NO_ROWS.items() for case in cases], ids=str
)
def test_no_row_at_all_is_refused_by_name_and_nothing_is_lost(tiny_model, skip_layers, name, given, said):
    (cache,) = filled(tiny_model, TurboQuantCache(tiny_model.config, skip_layers=skip_layers))
    with pytest.raises(ValueError, match=f"{re.escape(said)}.*, which keeps no sequence; keep at least one"):
        getattr(cache, OPERATIONS[name])(given)
    filled(tiny_model, cache, sizes=[1])
    assert cache.layers[1].batch_size == 2
    assert cache.layers[0].keys.shape[0] == 2


@pytest.mark.parametrize("repeats", [2, torch.tensor([1, 2])], ids=str)
def test_rows_are_repeated_as_a_dynamic_cache_repeats_them(tiny_model, repeats):
    caches = filled(tiny_model, TurboQuantCache(tiny_model.config, **EXACT), DynamicCache(config=tiny_model.config))
    for cache in caches:
        cache.batch_repeat_interleave(repeats)
    for layer, expected in zip(*(cache.layers for cache in caches), strict=True):
        assert difference(layer.keys, expected.keys) < 0.02


def test_prefix_tuning_of_peft_is_told_what_it_does(tiny_model):
    cache = TurboQuantCache(tiny_model.config)
    with pytest.warns(UserWarning, match="PEFT's prefix tuning puts a DynamicCache of its own"):
        assert cache.max_cache_len == -1


@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
def test_a_cache_is_filled_from_a_prefix(tiny_model, attention, assert_says_the_same):
    """What docs/quickstart-hf.md says of PEFT's prefixes."""
    tiny_model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    prefix = DynamicCache(torch.randn(2, 2, 2, 2, 10, 64, generator=generator).unbind())
    cache, tokens = TurboQuantCache(tiny_model.config, **EXACT), torch.nn.functional.pad(ids(6), (10, 0))
    for index, (keys, values, *_) in enumerate(prefix):
        cache.update(keys, values, index)
    assert_says_the_same(tiny_model, tokens, cache, prefix)
    tiny_model.set_attn_implementation("sdpa")


def test_export_refuses_it_by_name(tiny_model):
    with pytest.raises(ValueError, match="TurboQuantCache"):
        torch.export.export(
            tiny_model, (ids(6),), {"past_key_values": TurboQuantCache(tiny_model.config)}, strict=False
        )
