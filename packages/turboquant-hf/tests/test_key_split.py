"""Caches of keys in two halves of channels, one stored a bit finer and the other a bit coarser."""

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from turboquant_core import KeyTransform
from turboquant_core.pair_transform import pair_transform
from turboquant_core.split import SplitQuantizer
from turboquant_hf import TurboQuantCache, TurboQuantLayer
from turboquant_hf.attending import attending

HEADS, HEAD_DIM = 2, 64
CODES_ONLY = {"sink_tokens": 0, "recent_tokens": 0}
PRESETS = ["tq4", "tq3", "tq2"]


def transform_of(seed):
    """The scale and order of keys and queries that prefer some rotary pairs."""
    energies = torch.randn(2, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).exp()
    return pair_transform(None, *energies, torch.arange(HEAD_DIM) % (HEAD_DIM // 2))


TRANSFORMS = {0: transform_of(0), 1: transform_of(1)}


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model, sharpened):
    model = sharpened(tiny_model)
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture
def text():
    return torch.randint(1, 1500, (2, 6), generator=torch.Generator().manual_seed(9))


def new_cache(model, *args, **options):
    return TurboQuantCache(model.config, *args, key_transforms=TRANSFORMS, **options)


def logits_along(forward, cache, ids, text, mask=None):
    """Logits [batch_size, num_tokens, vocab_size] of a prompt's last token, and then of a text a token each call."""
    logits = []
    with torch.no_grad():
        for new in (ids, *text.split(1, dim=1)):
            padded = {}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(new)], dim=1) if logits else mask
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                padded = {"attention_mask": mask, "position_ids": positions}
            logits.append(forward(new, past_key_values=cache, **padded).logits[:, -1])
    return torch.stack(logits, dim=1)


def is_split(cache):
    return [layer.config.key_split for layer in cache.layers]


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_are_what_codes_of_both_halves_say(preset):
    given, bits = TRANSFORMS[0], int(preset[2:])
    layer = TurboQuantLayer(preset, key_transform=given)
    keys, values = torch.randn(2, 3, HEADS, 100, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    layer.update(keys, values)
    mean = keys.mean(2, keepdim=True)
    order = given.order[:, None].expand(keys.shape)
    stored = ((keys - mean) * given.scale[:, None]).gather(-1, order)
    quantizer = SplitQuantizer(HEAD_DIM, bits, "unbiased")
    came_back = quantizer.dequantize(quantizer.quantize(stored))
    expected = torch.empty_like(keys).scatter_(-1, order, came_back) / given.scale[:, None] + mean
    torch.testing.assert_close(layer.keys, expected, rtol=1e-4, atol=1e-4)
    unordered = TurboQuantLayer(preset, key_transform=KeyTransform(None, given.scale))
    unordered.update(keys, values)
    assert torch.equal(layer.values, unordered.values)


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_err_less_where_it_costs_and_take_two_bytes_more(preset):
    """Queries that are as unlike as keys are by channel see it."""
    random = torch.Generator().manual_seed(3)
    spread = torch.linspace(2, -2, HEAD_DIM // 2).exp().repeat(2)
    keys, values, queries = torch.randn(3, 1, HEADS, 200, HEAD_DIM, generator=random)
    keys, queries = keys * spread, queries * spread
    energies = (x.square().mean((0, 2)) for x in (keys, queries))
    given = pair_transform(None, *energies, torch.arange(HEAD_DIM) % (HEAD_DIM // 2))
    errors, nbytes = [], []
    for transform in (given, KeyTransform(None, given.scale)):
        layer = TurboQuantLayer(preset, key_transform=transform)
        layer.update(keys, values)
        errors.append((queries @ (layer.keys - keys).mT).square().sum())
        nbytes.append(layer.store.used_nbytes)
    assert errors[0] < 0.65 * errors[1]
    assert nbytes[0] - nbytes[1] == 2 * HEADS * 200


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [{}, CODES_ONLY, {"max_length": 70}], ids=["kept", "codes", "static"])
def test_decoding_on_codes_says_what_dequantising_says(model, prompt, text, preset, options, assert_near):
    cache, plain = new_cache(model, preset, **options), new_cache(model, preset, **options)
    found = logits_along(model, cache, prompt, text)
    with attending(model, "sdpa"):
        expected = logits_along(model, plain, prompt, text)
    assert is_split(cache) == [True, True]
    assert_near(found, expected)


@pytest.mark.parametrize("given", [{"key_bits": 8}, {"preset": "k8v4"}, {"preset": "k6v4"}, {"key_bits": 5}], ids=str)
def test_widths_that_no_halves_have_stay_whole(tiny_model, prompt, text, given):
    cache = new_cache(tiny_model, **given)
    logits_along(tiny_model, cache, prompt, text)
    assert is_split(cache) == [False, False]


def test_layers_are_split_by_their_own_bits_and_order(tiny_model, prompt, text):
    whole = KeyTransform(None, TRANSFORMS[0].scale)
    for options, expected in (
        ({"key_transforms": {1: TRANSFORMS[1]}}, [False, True]),
        ({"key_transforms": {0: whole, 1: TRANSFORMS[1]}}, [False, True]),
        ({"key_transforms": TRANSFORMS, "layer_bits": {0: (3, 4), 1: (8, 4)}}, [True, False]),
        ({"key_transforms": TRANSFORMS, "layer_bits": {0: (4, 2.5), 1: (2, 8)}}, [True, True]),
    ):
        cache = TurboQuantCache(tiny_model.config, **options)
        logits_along(tiny_model, cache, prompt, text)
        assert is_split(cache) == expected


def test_values_of_fractional_bits_change_no_keys():
    """Kernels store them beside whole bits alone."""
    keys, values = torch.randn(2, 1, HEADS, 100, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    found = []
    for value_bits in (4, 3.5):
        layer = TurboQuantLayer(value_bits=value_bits, key_transform=TRANSFORMS[0])
        layer.update(keys, values)
        assert layer.config.key_split
        found.append(layer.keys)
    torch.testing.assert_close(*found)


def test_small_heads_stay_whole(tiny_config, prompt, text):
    torch.manual_seed(5)
    model = LlamaForCausalLM(tiny_config(head_dim=32)).eval()
    order = torch.arange(32).flip(0).repeat(2, 1)
    cache = TurboQuantCache(model.config, key_transforms={0: KeyTransform(order=order)})
    logits_along(model, cache, prompt, text)
    assert is_split(cache) == [False, False]


@pytest.mark.parametrize("given", [False, True])
def test_a_layer_does_as_it_is_told(given):
    states = torch.randn(2, 1, HEADS, 10, HEAD_DIM)
    for transform in (TRANSFORMS[0], KeyTransform()):
        layer = TurboQuantLayer(key_split=given, key_transform=transform)
        layer.update(*states)
        assert layer.config.key_split is given
    with pytest.raises(ValueError, match="bits is 8; 2, 3, 4 can be split"):
        TurboQuantLayer("k8v4", key_split=True).update(*states)


def test_fractional_keys_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"layer 0 is given, and key_bits are 3.5: .* Give whole key_bits"):
        TurboQuantCache(tiny_config(), "tq3.5", key_transforms=TRANSFORMS)


@pytest.mark.parametrize("preset", ["tq4", "tq2"])
@pytest.mark.parametrize("options", [{}, {"max_length": 70}], ids=["growing", "static"])
def test_left_padding(tiny_model, sharpened, prompt, text, preset, options, assert_near):
    """A padded row says what it says alone."""
    model, mask = sharpened(tiny_model), torch.ones_like(prompt)
    model.set_attn_implementation("turboquant")
    mask[0, :9] = 0
    found = logits_along(model, new_cache(model, preset, **options), prompt, text, mask)
    for row, start in ((0, 9), (1, 0)):
        alone = new_cache(model, preset, **options)
        expected = logits_along(model, alone, prompt[row : row + 1, start:], text[row : row + 1])
        assert_near(found[row : row + 1], expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_windows(tiny_config, sharpened, prompt, text, preset, assert_near):
    torch.manual_seed(3)
    model = sharpened(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=16)).eval())
    caches = [new_cache(model, preset) for _ in range(2)]
    expected = logits_along(model, caches[0], prompt, text)
    assert is_split(caches[0]) == [True, True]
    assert all(layer.is_sliding for layer in caches[0].layers)
    with attending(model, "turboquant"):
        assert_near(logits_along(model, caches[1], prompt, text), expected)


def test_a_saved_cache_is_split_for_good(model, prompt, text, tmp_path):
    path = tmp_path / "prefix.safetensors"
    cache = new_cache(model, "tq3", layer_bits={1: (6, 4)})
    logits_along(model, cache, prompt, text[:, :1])
    cache.save(path)
    loaded = TurboQuantCache.load(path, model.config)
    assert is_split(loaded) == is_split(cache) == [True, False]
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(*(logits_along(model, each, text[:, 1:2], text[:, 2:]) for each in (loaded, cache)))
    loaded.reset()
    logits_along(model, loaded, prompt, text)
    assert is_split(loaded) == [True, False]


def test_memory_counts_both_scales(tiny_model, prompt, text):
    reports = []
    for options in ({"key_transforms": TRANSFORMS}, {}):
        cache = TurboQuantCache(tiny_model.config, "tq3", **options)
        logits_along(tiny_model, cache, prompt, text)
        report = cache.memory_report()
        assert report.nbytes == cache.nbytes
        reports.append(report)
    split, whole = reports
    num_tokens = 2 * (prompt.shape[1] + text.shape[1])
    for with_halves, without in zip(split.layers, whole.layers, strict=True):
        assert with_halves.token_nbytes - without.token_nbytes == 2 * HEADS * num_tokens
    assert "turboquant 3/3 bits, keys split" in split.table()
    assert "split" not in whole.table()
