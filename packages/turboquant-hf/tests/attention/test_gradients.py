import copy

import pytest
import torch
from transformers import DynamicCache

from turboquant_hf import TurboQuantCache

LOST = "backward.* needs the gradient of keys and values that TurboQuantCache stores as codes"


@pytest.fixture(params=["eager", "sdpa", "turboquant"])
def model(request, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(request.param)
    return model


def ids(*shape):
    return torch.randint(1500, shape, generator=torch.Generator().manual_seed(9))


def loss(model, cache, num_tokens):
    return model(ids(2, num_tokens), past_key_values=cache).logits.float().square().mean()


def frozen(model, but=()):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(tuple(but)) if but else False)
    return model


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("num_tokens", [1, 4, 12])
def test_a_backward_pass_through_stored_keys_says_that_they_have_no_gradient(model, num_tokens, max_length):
    cache = TurboQuantCache(model.config, max_length=max_length)
    loss(model, cache, 20)
    second = loss(model, cache, num_tokens)
    assert second.isfinite()
    with pytest.raises(RuntimeError, match=LOST):
        second.backward()


def test_a_prefix_that_is_trained_is_told_apart_from_one_that_is_not(model):
    frozen(model)
    prefix = [torch.randn(2, 2, 2, 5, 64) for _ in model.model.layers]
    for is_trained in (True, False):
        cache = TurboQuantCache(model.config)
        for index, states in enumerate(prefix):
            cache.update(*states.requires_grad_(is_trained), index)
        second = loss(model, cache, 4)
        assert second.requires_grad == is_trained
        if is_trained:
            with pytest.raises(RuntimeError, match=LOST):
                second.backward()


def test_the_first_call_has_the_gradients_of_no_cache(model):
    gradients = []
    for cache in (None, TurboQuantCache(model.config)):
        model.zero_grad()
        loss(model, cache, 20).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_what_comes_after_attention_can_be_trained_with_a_cache(model):
    frozen(model, but=["lm_head.weight", "1.self_attn.o_proj.weight"])
    gradients = []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, key_bits=8, value_bits=8)):
        model.zero_grad()
        with torch.no_grad():
            loss(model, cache, 20)
        loss(model, cache, 4).backward()
        gradients.append(model.model.layers[1].self_attn.o_proj.weight.grad.clone())
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_a_cache_begins_anew_without_gradients(model):
    cache = TurboQuantCache(model.config)
    loss(model, cache, 20)
    cache.reset()
    frozen(model)
    loss(model, cache, 20)
    assert not loss(model, cache, 4).requires_grad


def test_a_loaded_cache_has_none(model, tmp_path):
    frozen(model)
    cache = TurboQuantCache(model.config)
    loss(model, cache, 20)
    cache.save(tmp_path / "cache.safetensors")
    assert not loss(model, TurboQuantCache.load(tmp_path / "cache.safetensors", model.config), 4).requires_grad
