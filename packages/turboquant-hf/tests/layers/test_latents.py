"""Models whose keys and values are of different sizes: latents of DeepSeek's kind, and heads of MiMo's."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from turboquant_core.centring import mean_key
from turboquant_core.split import quantizer_of
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import with_cache
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.static import TurboQuantStaticLayer

SHAPES = [(512, 64), (192, 128)]
EXACT = {"key_bits": 8, "value_bits": 8}


def states(shapes, num_tokens, num_heads=1, batch_size=2):
    generator = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(batch_size, num_heads, num_tokens, size, generator=generator) for size in shapes]


def filled(shapes, num_tokens=100, **options):
    layer = TurboQuantLayer("tq4", **options)
    layer.update(*(x[:, :, :-1] for x in states(shapes, num_tokens)))
    read = layer.update(*(x[:, :, -1:] for x in states(shapes, num_tokens)))
    return layer, read


@pytest.fixture(scope="module")
def deepseek(tiny_latent_config):
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(tiny_latent_config(DeepseekV3Config)).eval()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("preset", ["tq4", "tq3", "tq2.5", "k6v4"])
def test_each_is_stored_as_its_own_quantizer_does(shapes, preset):
    layer = TurboQuantLayer(preset)
    keys, values = states(shapes, 100)
    layer.update(keys, values)
    read = layer.update(*states(shapes, 1))
    assert [x.shape for x in read] == [(2, 1, 101, size) for size in shapes]
    if preset == "tq2.5":
        for exact, stored in zip((keys, values), read, strict=True):
            assert (stored[:, :, :-1] - exact).norm() < 0.45 * exact.norm()
        return
    mean = mean_key(keys[:, 0].transpose(0, 1))
    for exact, stored, form, rule, offset in (
        (keys, read[0], layer.config.key_format, layer.config.key_scale, mean.view(2, 1, 1, -1)),
        (values, read[1], layer.config.value_format, layer.config.value_scale, 0),
    ):
        quantizer = quantizer_of(form, rule)
        expected = quantizer.dequantize(quantizer.quantize(exact - offset)) + offset
        torch.testing.assert_close(stored[:, :, :-1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES)
def test_bytes_are_those_of_both(shapes):
    layer, _ = filled(shapes)
    assert layer.config.slot_bytes == sum(size // 2 + 2 for size in shapes)
    assert layer.store.used_nbytes == 2 * 100 * layer.config.slot_bytes
    pages = layer.store.pages
    assert pages.tensor.numel() == -(-100 // 64) * 64 * 2 * layer.config.slot_bytes


@pytest.mark.parametrize("shapes", SHAPES)
def test_rows_and_tokens_come_and_go(shapes):
    layer, _ = filled(shapes, sink_tokens=1, recent_tokens=8)
    before = [x.clone() for x in (layer.keys, layer.values)]
    layer.reorder_cache(torch.tensor([1, 0]))
    for was, now in zip(before, (layer.keys, layer.values), strict=True):
        assert torch.equal(now, was[[1, 0]])
    layer.update(*states(shapes, 30))
    layer.crop(-30)
    for was, now in zip(before, (layer.keys, layer.values), strict=True):
        assert torch.equal(now[:, :, :90], was[[1, 0]][:, :, :90])
    layer.offload()
    layer.prefetch()
    assert layer.get_seq_length() == 100


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_static_layer_gives_the_same(shapes):
    keys, values = states(shapes, 100)
    kept = {"sink_tokens": 1, "recent_tokens": 8}
    layers = [TurboQuantLayer("tq4", **kept), TurboQuantStaticLayer(130, "tq4", **kept)]
    for layer in layers:
        layer.update(keys[:, :, :90], values[:, :, :90])
    for token in range(90, 100):
        read = [layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1]) for layer in layers]
        for growing, static in zip(*read, strict=True):
            assert torch.equal(growing, static[:, :, : token + 1])


def test_keys_and_values_of_another_size_are_refused_later():
    layer, _ = filled((512, 64))
    with pytest.raises(ValueError, match=r"value_states are \[2, 1, 3, 32\]; this cache holds .* \[2, 1, 3, 64\]"):
        layer.update(*states((512, 32), 3))
    with pytest.raises(ValueError, match="keys have 64 channels, values 32, and the cache was made for head_dim 64"):
        TurboQuantLayer("tq4", head_dim=64).update(*states((64, 32), 3))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "turboquant"])
def test_a_model_of_latents_generates_as_uncompressed(deepseek, attention):
    deepseek.set_attn_implementation(attention)
    prompt = torch.randint(1, 300, (1, 70), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "do_sample": False}
    cache = TurboQuantCache(deepseek.config, **EXACT)
    with torch.no_grad():
        logits = [
            deepseek(torch.cat([prompt, prompt[:, :5]], dim=1), **with_cache(each)).logits[:, -5:]
            for each in (cache, DynamicCache(config=deepseek.config))
        ]
        text = deepseek.generate(prompt, **with_cache(TurboQuantCache(deepseek.config, **EXACT)), **options)
    assert (logits[0] - logits[1]).norm() < 0.01 * logits[1].norm()
    assert text.shape == (1, 90)
    report = cache.memory_report()
    assert report.bf16_nbytes == 2 * 2 * 75 * (64 + 16)
    assert report.layers[0].token_nbytes == 75 * (64 + 2 + 16 + 2)


def test_what_is_saved_comes_back(deepseek, tmp_path):
    deepseek.set_attn_implementation("sdpa")
    prompt = torch.randint(1, 300, (2, 70), generator=torch.Generator().manual_seed(1))
    cache = TurboQuantCache(deepseek.config)
    with torch.no_grad():
        deepseek(prompt, **with_cache(cache))
    cache.save(tmp_path / "cache")
    loaded = TurboQuantCache.load(tmp_path / "cache", deepseek.config)
    assert loaded.layers[0].config.head_dims == (64, 16)
    with torch.no_grad():
        expected, found = (deepseek(prompt[:, :3], **with_cache(each)).logits for each in (cache, loaded))
    assert torch.equal(found, expected)
