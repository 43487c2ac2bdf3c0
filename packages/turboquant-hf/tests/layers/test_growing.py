import copy
import pickle

import pytest
import torch

from turboquant_hf import TurboQuantCache, TurboQuantLayer
from turboquant_hf._compat import DynamicSlidingWindowLayer
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer

PRESETS = ["tq4", "tq3", "tq2.5", "k8v4"]


def random_states(batch_size=2, num_tokens=10, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 2, num_tokens, 64, generator=generator).to(dtype) for _ in range(2)]


def filled(preset="tq4", batch_size=2, num_tokens=12, **overrides):
    layer = TurboQuantLayer(preset, **overrides)
    layer.update(*random_states(batch_size, num_tokens))
    return layer


def read(layer):
    """What the stored tokens read as, through a call that adds none."""
    empty = torch.zeros(layer.batch_size, 2, 0, 64, dtype=layer.dtype)
    return layer.update(empty, empty)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prefill_attends_on_raw_states_and_later_tokens_on_codes(dtype):
    keys, values = random_states(dtype=dtype)
    layer = TurboQuantLayer("tq4")
    assert_same(layer.update(keys, values), (keys, values))
    new_keys, new_values = random_states(num_tokens=1, seed=1, dtype=dtype)
    read_keys, read_values = layer.update(new_keys, new_values)
    assert read_keys.shape == read_values.shape == (2, 2, 11, 64)
    assert read_keys.dtype == dtype
    assert not torch.equal(read_keys[..., :10, :], keys)
    error = (read_keys[..., :10, :] - keys).float().square().sum() / keys.float().square().sum()
    assert error < 0.012


@pytest.mark.parametrize("preset", PRESETS)
def test_how_tokens_are_grouped_changes_nothing(preset):
    prompt = random_states(num_tokens=12)
    more = random_states(num_tokens=6, seed=1)
    at_once, one_by_one = TurboQuantLayer(preset), TurboQuantLayer(preset)
    for layer in (at_once, one_by_one):
        layer.update(*prompt)
    expected = at_once.update(*more)
    for i in range(6):
        actual = one_by_one.update(*(states[..., i : i + 1, :] for states in more))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_but_codes_scales_and_calibration_is_kept(preset):
    layer = filled(preset)
    assert layer.keys.shape == layer.values.shape == (2, 2, 12, 64)
    kept = pickle.loads(pickle.dumps(layer)).tensors()
    held_in_attributes = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert held_in_attributes == []
    assert sum(t.numel() for t in kept if t.dtype == torch.float32) == 2 * 2 * 64  # the key mean


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("operation", "expected_batch"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: (layer.offload(), layer.prefetch()), [0, 1]),
    ],
    ids=["reorder", "repeat", "select", "offload"],
)
def test_batch_operations_are_exact(preset, operation, expected_batch):
    layer = filled(preset)
    before = read(layer)
    operation(layer)
    assert layer.batch_size == len(expected_batch)
    assert_same(read(layer), [states[expected_batch] for states in before])


def test_a_reordered_sequence_keeps_its_own_mean():
    layer = filled()
    new = random_states(num_tokens=1, seed=3)
    straight = copy.deepcopy(layer).update(*new)
    layer.reorder_cache(torch.tensor([1, 0]))
    swapped = layer.update(*(states[[1, 0]] for states in new))
    assert_same([states[[1, 0]] for states in swapped], straight)


def test_crop_equals_a_cache_built_afresh():
    prompt, more, other = (random_states(num_tokens=n, seed=s) for n, s in ((12, 0), (4, 1), (3, 2)))
    cropped, fresh = TurboQuantLayer("tq4"), TurboQuantLayer("tq4")
    cropped.update(*prompt)
    cropped.update(*more)
    cropped.crop(-4)
    fresh.update(*prompt)
    assert cropped.get_seq_length() == 12
    assert_same(cropped.update(*other), fresh.update(*other))


def test_crop_of_nothing_and_of_everything():
    layer = filled()
    layer.crop(0)
    assert layer.get_seq_length() == 12
    layer.crop(-100)
    assert layer.get_seq_length() == 0
    keys, values = random_states(num_tokens=3)
    assert_same(layer.update(keys, values), (keys, values))


def test_positive_crop_is_refused():
    with pytest.raises(ValueError, match=r"crop got 5; pass .* negative"):
        filled().crop(5)


def test_reset_takes_another_batch():
    layer = filled()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.tensors() == []
    layer.update(*random_states(batch_size=3))
    assert layer.batch_size == 3


def test_mask_sizes_and_lengths():
    layer = TurboQuantLayer("tq4")
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(7) == (7, 0)
    layer.update(*random_states(num_tokens=12))
    assert layer.get_seq_length() == 12
    assert layer.get_mask_sizes(1) == (13, 0)
    assert layer.get_max_length() == -1


def test_early_initialisation_without_tokens():
    layer = TurboQuantLayer("tq4")
    empty = torch.zeros(2, 2, 0, 64)
    layer.lazy_initialization(empty, empty)
    keys, values = random_states()
    assert_same(layer.update(keys, values), (keys, values))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate):
    layer = filled("tq2.5")
    twin = duplicate(layer)
    assert_same(read(twin), read(layer))
    twin.update(*random_states(num_tokens=2, seed=1))
    assert (layer.get_seq_length(), twin.get_seq_length()) == (12, 14)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (random_states(batch_size=3), r"key_states are \[3, 2, 10, 64\].*\[2, 2, 10, 64\].*reset"),
        (random_states(dtype=torch.bfloat16), r"key_states are torch.bfloat16 on cpu.*torch.float32 on cpu"),
        ([x.to("meta") for x in random_states()], r"key_states are torch.float32 on meta.*torch.float32 on cpu"),
        ([random_states()[0], random_states(num_tokens=4)[0]], r"value_states are \[2, 2, 4, 64\]"),
    ],
    ids=["batch", "dtype", "device", "length"],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(states, message):
    layer = filled()
    before = read(layer)
    with pytest.raises(ValueError, match=message):
        layer.update(*states)
    assert_same(read(layer), before)


def test_keys_of_another_head_dim_than_the_layer_was_made_for_are_refused():
    with pytest.raises(ValueError, match="keys have 64 channels, values 64, and the cache was made for head_dim 128"):
        TurboQuantLayer(head_dim=128).update(*random_states())
    TurboQuantLayer(head_dim=64).update(*random_states())


@pytest.mark.parametrize("window", [2, 64, 65, 80])
def test_a_window_is_all_there_at_every_length(window):
    """Blocks are dropped as soon as no later token sees them, and not a token earlier."""
    layer, exact = TurboQuantSlidingLayer(window, "k8v4", value_bits=8), DynamicSlidingWindowLayer(window)
    for num_new in (10, *[1] * 200):
        states = random_states(1, num_new, seed=num_new + exact.get_seq_length())
        (keys, values), (expected_keys, expected_values) = layer.update(*states), exact.update(*states)
        assert keys.shape == expected_keys.shape
        assert (keys[:, :, -1] - expected_keys[:, :, -1]).norm() < 0.03 * expected_keys[:, :, -1].norm()
        assert (values[:, :, 0] - expected_values[:, :, 0]).norm() < 0.03 * expected_values[:, :, 0].norm()
        assert layer.store.num_tokens < window - 1 + 1 + 64


def test_autocast_of_a_model_in_another_type_is_refused_by_name(tiny_model, prompt):
    cache = TurboQuantCache(tiny_model.config)
    message = "key_states are torch.float32 and value_states torch.bfloat16, as torch.autocast makes them"
    for _ in range(2):
        with pytest.raises(ValueError, match=message), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            tiny_model(prompt, past_key_values=cache)
        cache.reset()
        with torch.no_grad():
            tiny_model(prompt, past_key_values=cache)
