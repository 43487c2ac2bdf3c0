import pytest
import torch
from transformers import DynamicCache, MistralConfig, StaticCache

from turboquant_hf import CompressedDynamicCache, TurboQuantCache
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer


def generate(model, prompt, cache, **kwargs):
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **kwargs}
    arguments.setdefault("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, past_key_values=cache, **arguments)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}])
def test_the_wrapped_cache_gives_what_turboquant_cache_gives(tiny_model, prompt, with_config, kwargs):
    cache = DynamicCache(config=tiny_model.config) if with_config else DynamicCache()
    compressed = CompressedDynamicCache(cache, head_dim=64, bits=4)
    expected_cache = TurboQuantCache(tiny_model.config)
    expected = generate(tiny_model, prompt, expected_cache, **kwargs)
    assert torch.equal(generate(tiny_model, prompt, cache, **kwargs), expected)
    assert all(type(layer) is TurboQuantLayer for layer in cache.layers)
    assert compressed.vram_bytes() == expected_cache.nbytes
    assert compressed.memory_report() == expected_cache.memory_report()


def test_keys_and_values_may_have_bits_of_their_own(tiny_model, prompt):
    cache = DynamicCache()
    CompressedDynamicCache(cache, 64, k_bits=8, v_bits=3)
    generate(tiny_model, prompt, cache)
    assert cache.layers[0].config.key_bits == 8
    assert cache.layers[0].config.value_bits == 3


def test_drafts_crop_and_reset(tiny_model, prompt, assert_says_the_same):
    cache = DynamicCache()
    CompressedDynamicCache(cache, head_dim=64, bits=4)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {}):
        expected = TurboQuantCache(tiny_model.config)
        assert_says_the_same(tiny_model, prompt[:1], cache, expected, found_options=drafts)
        cache.reset()


def test_nothing_else_is_touched(tiny_model, prompt):
    methods = dict(vars(DynamicCache))
    CompressedDynamicCache(DynamicCache(), head_dim=64)
    assert dict(vars(DynamicCache)) == methods
    other = DynamicCache()
    generate(tiny_model, prompt, other)
    assert not isinstance(other.layers[0], TurboQuantLayer)


def test_a_wrong_head_dim_is_an_error(tiny_model, prompt):
    cache = DynamicCache()
    CompressedDynamicCache(cache, head_dim=128, bits=4)
    with pytest.raises(ValueError, match="keys have 64 channels, values 64, and the cache was made for head_dim 128"):
        generate(tiny_model, prompt, cache)


def test_leaving_the_context_dequantises(tiny_model, prompt, assert_says_the_same):
    cache = DynamicCache()
    with CompressedDynamicCache(cache, head_dim=64, bits=8):
        output = generate(tiny_model, prompt, cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 2
    longer = torch.cat([output, prompt], dim=1)
    assert_says_the_same(tiny_model, longer, cache, DynamicCache())


def test_windows_are_compressed_where_the_cache_knows_of_them():
    config = MistralConfig(num_hidden_layers=1, sliding_window=16)
    cache = DynamicCache(config=config)
    compressed = CompressedDynamicCache(cache, head_dim=128)
    assert type(cache.layers[0]) is TurboQuantSlidingLayer
    cache.update(*torch.randn(2, 1, config.num_key_value_heads, 5, 128), 0)
    with pytest.raises(ValueError, match="sliding-window layer that holds tokens cannot be restored"):
        compressed.restore()
    cache.reset()
    compressed.restore()
    assert type(cache.layers[0]) is type(DynamicCache(config=config).layers[0])
    cache.update(*torch.randn(2, 1, config.num_key_value_heads, 40, 128), 0)
    assert cache.layers[0].keys.shape[2] == 15


def test_sinks_and_recent_tokens(tiny_model, prompt):
    kept = {"sink_tokens": 3, "recent_tokens": 7}
    cache = DynamicCache()
    with CompressedDynamicCache(cache, head_dim=64, bits=4, **kept) as compressed:
        expected_cache = TurboQuantCache(tiny_model.config, **kept)
        expected = generate(tiny_model, prompt, expected_cache)
        assert torch.equal(generate(tiny_model, prompt, cache), expected)
        assert compressed.vram_bytes() == expected_cache.nbytes
        store, length = cache.layers[0].store, cache.layers[0].store.length
        raw = store.full_precision.in_order(length.num_first, length.held_from, length.num_tokens)[0]
    assert torch.equal(cache.layers[0].keys[:, :, :3], raw[:, :, :3])
    assert torch.equal(cache.layers[0].keys[:, :, -7:], raw[:, :, -7:])
    with pytest.raises(ValueError, match="recent_tokens is -4"):
        CompressedDynamicCache(DynamicCache(), head_dim=64, recent_tokens=-4)


def test_what_cannot_be_wrapped_is_refused(tiny_model, prompt):
    cache = DynamicCache()
    CompressedDynamicCache(cache, head_dim=64)
    with pytest.raises(ValueError, match="compressed already"):
        CompressedDynamicCache(cache, head_dim=64)
    used = DynamicCache()
    generate(tiny_model, prompt, used)
    with pytest.raises(ValueError, match=r"holds 51 tokens; .* reset"):
        CompressedDynamicCache(used, head_dim=64)
    with pytest.raises(TypeError, match="cache is StaticCache"):
        CompressedDynamicCache(StaticCache(config=tiny_model.config, max_cache_len=64), head_dim=64)
    with pytest.raises(ValueError, match="key_bits is 7"):
        CompressedDynamicCache(DynamicCache(), head_dim=64, bits=7)
