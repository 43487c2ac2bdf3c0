"""Transforms of keys that a cache is made with, by layer or in a file."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3NextConfig

from turboquant_core import KeyTransform
from turboquant_core.calibration import Calibration, write_calibration
from turboquant_core.key_transform import IDENTITY
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf import TurboQuantCache, TurboQuantLayer


def transform_of(seed, heads=2, size=64):
    """One that no prompt gives: keys come back only by undoing it."""
    random = torch.Generator().manual_seed(seed)
    mean, scale, order = torch.randn(3, heads, size, generator=random)
    return KeyTransform(mean / 4, (scale / 2).exp(), order.argsort(-1))


TRANSFORMS = {0: transform_of(0), 1: transform_of(1)}
MEAN, WITHOUT_MEAN = KeyTransform(TRANSFORMS[0].mean), TRANSFORMS[1].without_mean()
EIGHT_BITS = {"key_bits": 8, "value_bits": 8}


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model, sharpened):
    model = sharpened(tiny_model)
    model.set_attn_implementation(request.param)
    return model


def filled(model, prompt, cache):
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache


def transform_in_use(cache, index=0):
    return cache.layers[index].store.pages.codec.key_transform


def assert_goes_through(cache, transform, index=0):
    """Every row of a layer goes through this, and where it has no mean, each through one of its own."""
    used = transform_in_use(cache, index)
    for name, part, given in zip(("mean", "scale", "order"), used.parts, transform.parts, strict=True):
        if given is not None:
            assert torch.equal(part, torch.cat([given] * (len(part) // len(given))))
        elif name == "mean":
            assert len({tuple(mean.tolist()) for mean in part}) == len(part)
        else:
            assert part is None


@pytest.mark.parametrize(
    "options",
    [{}, {"sink_tokens": 0, "recent_tokens": 0}, {"max_length": 64}, {"sink_tokens": 50}],
    ids=["kept", "codes", "static", "sinks"],
)
def test_keys_of_all_rows_go_through_the_given_transform_and_come_back(
    tiny_model, sharpened, model, prompt, options, next_logits
):
    sharp = sharpened(tiny_model)
    expected = next_logits(sharp, prompt, filled(sharp, prompt, DynamicCache()))
    cache = TurboQuantCache(model.config, key_transforms={0: TRANSFORMS[0], -1: TRANSFORMS[1]}, **EIGHT_BITS, **options)
    found = next_logits(model, prompt, filled(model, prompt, cache))
    assert (found - expected).norm() < 0.1 * expected.norm()
    if options.get("sink_tokens") != 50:
        for index, transform in TRANSFORMS.items():
            assert_goes_through(cache, transform, index)


@pytest.mark.parametrize("given", [WITHOUT_MEAN, IDENTITY], ids=["no mean", "none"])
def test_without_a_mean_it_is_left_to_the_prompt(tiny_model, prompt, given):
    plain = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config))
    cache = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config, key_transforms={0: given}))
    assert torch.equal(transform_in_use(cache).mean, transform_in_use(plain).mean)
    assert_goes_through(cache, given)
    uncentred = TurboQuantCache(tiny_model.config, key_transforms={0: given}, center_keys=False)
    assert transform_in_use(filled(tiny_model, prompt, uncentred)).mean is None


def test_with_a_mean_it_takes_the_place_of_the_prompts(tiny_model, prompt):
    given = KeyTransform(torch.zeros(2, 64))
    cache = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config, key_transforms={0: given}))
    plain = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config, center_keys=False))
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)


def test_it_outlives_every_token(tiny_model, prompt, offloaded_cache):
    for kind, options in ((TurboQuantCache, {}), (TurboQuantCache, {"max_length": 64}), (offloaded_cache, {})):
        cache = kind(tiny_model.config, key_transforms=TRANSFORMS, **options)
        filled(tiny_model, prompt, cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        for forget in (lambda cache: cache.crop(-cache.get_seq_length()), lambda cache: cache.reset()):
            forget(cache)
            filled(tiny_model, prompt, cache)
            assert_goes_through(cache, TRANSFORMS[0])


def test_it_moves_with_what_is_stored(tiny_model, prompt):
    cache = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config, key_transforms=TRANSFORMS))
    assert {tensor.device.type for tensor in cache.layers[0].store.to("meta").tensors()} == {"meta"}


def test_left_padding(model, prompt):
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    cache = TurboQuantCache(model.config, key_transforms=TRANSFORMS, **EIGHT_BITS)
    with torch.no_grad():
        expected = model(prompt[:1, 7:]).logits[:, -1]
        model(prompt[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        found = model(prompt[:, -1:], attention_mask=mask, past_key_values=cache).logits[:1, -1]
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert_goes_through(cache, TRANSFORMS[0])


def test_windows(tiny_config, sharpened, next_logits):
    torch.manual_seed(3)
    model = sharpened(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=16)).eval())
    prompt = torch.randint(1500, (2, 40), generator=torch.Generator().manual_seed(6))
    expected = next_logits(model, prompt, filled(model, prompt, DynamicCache(config=model.config)))
    cache = filled(model, prompt, TurboQuantCache(model.config, key_transforms=TRANSFORMS, **EIGHT_BITS))
    found = next_logits(model, prompt, cache)
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert_goes_through(cache, TRANSFORMS[1], 1)


def test_a_graph_takes_it(tiny_config, prompt, next_logits):
    """One of a prompt that is not the first: Dynamo cannot trace how storage is made."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    caches = [TurboQuantCache(model.config, max_length=64, key_transforms={0: TRANSFORMS[0]}) for _ in range(2)]
    for forward, cache in zip((model, compiled), caches, strict=True):
        filled(model, prompt, cache).reset()
        filled(forward, prompt, cache)
    # The second one reads what the first one wrote.
    for _ in range(2):
        expected, found = (
            next_logits(forward, prompt, cache) for forward, cache in zip((model, compiled), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert caches[1].layers[0].config.key_split
    torch.compiler.reset()


@pytest.mark.parametrize("num_tokens", [1, 40], ids=["sinks alone", "codes"])
@pytest.mark.parametrize(
    "transform", [TRANSFORMS[1], MEAN, WITHOUT_MEAN, IDENTITY], ids=["all", "mean", "no mean", "none"]
)
def test_a_saved_cache_keeps_it_for_good(model, prompt, tmp_path, num_tokens, transform, next_logits):
    path = tmp_path / "prefix.safetensors"
    # What a prompt gives one layer is beside what another was given.
    cache = TurboQuantCache(model.config, key_transforms={1: transform}, **EIGHT_BITS)
    filled(model, prompt[:, :num_tokens], cache).save(path)
    in_file = load_file(path)
    for name in ("key_mean", "key_scale", "key_channel_order"):
        given, kept = transform.tensors().get(name), in_file.get(f"layers.1.{name}")
        if given is not None:
            assert torch.equal(kept, given)
        else:
            # A mean of each row, where there are codes.
            assert (kept is None) is (name != "key_mean" or num_tokens == 1)
    loaded = TurboQuantCache.load(path, model.config)
    assert loaded.nbytes == cache.nbytes
    for _ in range(2):
        assert torch.equal(next_logits(model, prompt, loaded), next_logits(model, prompt, cache))
    loaded.reset()
    filled(model, prompt, loaded)
    assert_goes_through(loaded, transform, 1)
    assert transform_in_use(loaded).mean is not None
    assert transform_in_use(loaded).only_centres


@pytest.fixture
def calibrated(tiny_config, tmp_path):
    """Writes a calibration of a model to a file."""

    def write(layers, **changes):
        identity = ModelIdentity.of(tiny_config(**changes), "LlamaForCausalLM")
        write_calibration(tmp_path / "keys.safetensors", Calibration(layers, identity, "a/model", num_tokens=9))
        return tmp_path / "keys.safetensors"

    return write


def test_scale_and_order_of_a_file_and_the_mean_of_the_prompt(tiny_model, prompt, calibrated):
    path = calibrated(TRANSFORMS)
    cache = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config, key_transforms=path))
    plain = filled(tiny_model, prompt, TurboQuantCache(tiny_model.config))
    assert_goes_through(cache, TRANSFORMS[0].without_mean())
    assert torch.equal(transform_in_use(cache).mean, transform_in_use(plain).mean)
    uncentred = TurboQuantCache(tiny_model.config, key_transforms=path, center_keys=False)
    assert transform_in_use(filled(tiny_model, prompt, uncentred)).mean is None
    assert_goes_through(cache, TRANSFORMS[1].without_mean(), 1)


def test_a_file_of_means_alone_changes_nothing(tiny_model, prompt, calibrated, next_logits):
    path = calibrated({0: MEAN, 1: MEAN})
    cache, plain = TurboQuantCache(tiny_model.config, key_transforms=path), TurboQuantCache(tiny_model.config)
    found, expected = (next_logits(tiny_model, prompt, filled(tiny_model, prompt, each)) for each in (cache, plain))
    assert torch.equal(found, expected)


def test_a_file_serves_its_model_and_all_of_its_layers(tiny_config, calibrated, tmp_path):
    path = calibrated({0: TRANSFORMS[0]})
    with pytest.raises(ValueError, match=r"a/model has none for layer 1\. .*turboquant calibrate"):
        TurboQuantCache(tiny_config(), key_transforms=path)
    TurboQuantCache(tiny_config(), key_transforms=str(path), skip_layers=[-1])
    with pytest.raises(ValueError, match="hidden_size 64 and 128"):
        TurboQuantCache(tiny_config(hidden_size=128), key_transforms=path)
    with pytest.raises(ValueError, match=r"layer 0 of a/model: key_mean is torch.float32 \[2, 64\]; these keys need"):
        TurboQuantCache(tiny_config(num_key_value_heads=4), key_transforms=path, skip_layers=[1])
    with pytest.raises(FileNotFoundError, match="turboquant calibrate"):
        TurboQuantCache(tiny_config(), key_transforms=tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("transforms", "options", "message"),
    [
        (
            5,
            {},
            r"key_transforms is 5; write \{0: KeyTransform\(...\)\} for every layer .* `turboquant calibrate` wrote",
        ),
        ({2: MEAN}, {}, "key_transforms names layer 2; this model has 2 layers with a cache"),
        ({1: MEAN, -1: MEAN}, {}, "key_transforms names layer 1 twice, once as -1"),
        ({0: MEAN}, {"skip_layers": [0]}, "layer 0 is in key_transforms and in skip_layers"),
        ({0: torch.zeros(2, 64)}, {}, "key_transforms of layer 0 is a Tensor; write a turboquant_core.KeyTransform"),
        ({1: KeyTransform(torch.zeros(1, 64))}, {}, r"layer 1: key_mean is torch.float32 \[1, 64\]; these keys need"),
        ({0: transform_of(0, size=32)}, {}, r"layer 0: key_mean is torch.float32 \[2, 32\]; these keys need"),
        ({0: KeyTransform(torch.zeros(3, 2, 64))}, {}, r"layer 0: key_mean is torch.float32 \[3, 2, 64\]"),
        ({0: MEAN.map(lambda part: part * torch.nan)}, {}, "key_transforms of layer 0: key_mean holds nan"),
        ({0: MEAN}, {"preset": "tq2.5"}, r"layer 0 is given, and key_bits are 2.5: .* Give whole key_bits"),
        ({0: MEAN}, {"layer_bits": {0: (3.5, 4)}}, "layer 0 is given, and key_bits are 3.5"),
        ({0: MEAN}, {"center_keys": False}, "layer 0 has a mean, and center_keys is False. Leave center_keys out"),
    ],
)
def test_what_cannot_be_a_layers_transform_is_refused_at_once(tiny_config, transforms, options, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(tiny_config(), key_transforms=transforms, **options)


def test_layers_that_are_not_compressed_are_refused():
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match="key_transforms names layer 0, a LinearAttentionLayer, which is not compres"):
        TurboQuantCache(config, key_transforms={0: MEAN})


def test_keys_of_fewer_heads_are_refused():
    layer = TurboQuantLayer(key_transform=MEAN)
    with pytest.raises(ValueError, match=r"key_mean is torch.float32 \[2, 64\]; these keys need float32 \[1, 64\]"):
        layer.update(*torch.randn(2, 1, 1, 5, 64))


def test_layers_own_what_they_are_given(tiny_model, prompt, tmp_path, next_logits):
    """One transform for all layers can be saved, and a later change of its tensors reaches neither cache nor file."""
    transform = KeyTransform(TRANSFORMS[0].mean.clone())
    layers = range(tiny_model.config.num_hidden_layers)
    cache = filled(
        tiny_model, prompt, TurboQuantCache(tiny_model.config, key_transforms=dict.fromkeys(layers, transform))
    )
    transform.mean.add_(5)
    cache.save(tmp_path / "cache.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "cache.safetensors", tiny_model.config)
    assert torch.equal(*(next_logits(tiny_model, prompt, each) for each in (cache, loaded)))
