import copy

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.models.llama import modeling_llama

from turboquant_core import TurboQuantConfig
from turboquant_hf import TurboQuantCache
from turboquant_hf.attention.function import turboquant_attention
from turboquant_hf.attention.handover import Placeholder, Stored, hand_over
from turboquant_hf.storage.growing.store import growing_store

DEVICE = torch.device("cpu")


def ids(*shape):
    return torch.randint(1500, shape, generator=torch.Generator().manual_seed(9))


def placeholders():
    store = growing_store(TurboQuantConfig(64), 2, 2, torch.float32, DEVICE)
    store.append(*torch.randn(2, 2, 2, 100, 64))
    return hand_over(Stored(store, None), (2, 2, 100, 64), torch.bfloat16, DEVICE)


def test_a_placeholder_takes_no_memory_and_says_what_it_is_like():
    keys, values = placeholders()
    assert keys.untyped_storage().nbytes() == 2
    for states in (keys, values):
        assert states.shape == (2, 2, 100, 64)
        assert states.size(-2) == states.shape[-2] == 100
        assert (states.ndim, states.dtype, states.device, len(states)) == (4, torch.bfloat16, DEVICE, 2)
        assert not states.requires_grad
        assert "Placeholder" in repr(states)


def test_what_leaves_a_placeholder_as_it_is_gives_it_back():
    keys, _ = placeholders()
    same = (
        keys.contiguous(),
        keys.detach(),
        keys.to(torch.bfloat16),
        keys.to("cpu"),
        keys.type_as(torch.ones(1, dtype=keys.dtype)),
    )
    assert all(states is keys for states in same)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :1],
        lambda x: x.to(torch.float32),
        lambda x: x.repeat_interleave(2, dim=1),
        lambda x: torch.matmul(torch.ones(64, 64, dtype=x.dtype), x.mT),
        lambda x: torch.cat([x, x]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: bool(x.isnan().any()),
    ],
)
def test_nobody_computes_with_a_placeholder(compute):
    with pytest.raises(
        RuntimeError, match=r"This model calls \w+ on the keys or values that TurboQuantCache hands over"
    ):
        compute(placeholders()[0])


def test_whoever_gets_around_it_finds_nan():
    with torch._C.DisableTorchFunctionSubclass():
        assert placeholders()[0].isnan().all()


@pytest.mark.parametrize("changed", ["keys", "values"])
def test_attention_takes_both_placeholders_or_none(tiny_model, changed):
    states, others = dict.fromkeys(("keys", "values"), placeholders()[0]), torch.zeros(2, 2, 100, 64)
    query, module = torch.randn(2, 4, 1, 64), tiny_model.model.layers[0].self_attn
    message = rf"LlamaAttention changes the {changed} that .* which this llama model does not\. Use .*\"sdpa\" or"
    with pytest.raises(RuntimeError, match=message):
        turboquant_attention(module, query, *{**states, changed: others}.values(), None)


# A model of transformers, what it does with keys and values, and the attention that serves it.
def diffllama(tiny_config):
    return DiffLlamaForCausalLM, tiny_config(DiffLlamaConfig, hidden_size=256)


def bloom(_):
    return BloomForCausalLM, BloomConfig(vocab_size=1500, hidden_size=256, n_layer=2, n_head=4, eos_token_id=None)


def mpt(_):
    return MptForCausalLM, MptConfig(vocab_size=1500, d_model=256, n_layers=2, n_heads=4, eos_token_id=None)


def build(make, tiny_config, attention):
    kind, config = make(tiny_config)
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation=attention).eval()


def test_a_model_that_changes_values_is_refused_at_its_first_token(tiny_config):
    model = build(diffllama, tiny_config, "turboquant")
    message = r"DiffLlamaForCausalLM splits values .* Use attn_implementation=\"sdpa\" or \"eager\""
    with pytest.raises(ValueError, match=message):
        model.generate(ids(1, 20), past_key_values=TurboQuantCache(model.config), max_new_tokens=4)


@pytest.mark.parametrize("make", [bloom, mpt])
@pytest.mark.parametrize("kind", [TurboQuantCache, DynamicCache])
def test_a_model_with_attention_of_its_own_is_refused_at_its_first_token(tiny_config, make, kind):
    model = build(make, tiny_config, "turboquant")
    message = r"ForCausalLM does not attend through .* Use attn_implementation=\"eager\" for it"
    with pytest.raises(ValueError, match=message):
        model.generate(ids(1, 20), past_key_values=kind(config=model.config), max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        model(ids(1, 20))


@pytest.mark.parametrize("make", [diffllama, bloom])
def test_the_attention_that_is_named_serves_them(tiny_config, make):
    model = build(make, tiny_config, "eager")
    steps = []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, key_bits=8, value_bits=8)):
        with torch.no_grad():
            model(ids(1, 20), past_key_values=cache)
            steps.append(model(ids(1, 3), past_key_values=cache).logits)
    assert (steps[1] - steps[0]).norm() < 0.03 * steps[0].norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_than_the_configuration_names_is_refused(tiny_model, attention):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(attention)
    of_another = copy.deepcopy(model.config)
    of_another._attn_implementation = "turboquant"
    with pytest.raises(RuntimeError, match=r"LlamaAttention calls \w+ on the keys or values"), torch.no_grad():
        model(ids(2, 20), past_key_values=TurboQuantCache(of_another))


class Halved:
    def __init__(self, cache):
        self.cache = cache

    def update(self, *states):
        keys, values = self.cache.update(*states)
        return keys / 2, values


class Halving(modeling_llama.LlamaAttention):
    """Makes its keys smaller after they are stored."""

    def forward(self, *args, past_key_values, **kwargs):
        return super().forward(*args, past_key_values=Halved(past_key_values), **kwargs)


@pytest.fixture
def one_layer(tiny_config):
    torch.manual_seed(0)
    torch.compiler.reset()
    yield LlamaForCausalLM(tiny_config(num_hidden_layers=1, attn_implementation="turboquant")).eval()
    torch.compiler.reset()


def test_a_compiled_model_that_changes_keys_is_refused_too(one_layer):
    one_layer.model.layers[0].self_attn.__class__ = Halving
    with pytest.raises(RuntimeError, match=r"Halving calls \w+ on the keys or values that TurboQuantCache hands over"):
        torch.compile(one_layer, backend="eager")(ids(2, 20), past_key_values=TurboQuantCache(one_layer.config))


def test_a_graph_that_breaks_between_update_and_attention(one_layer, monkeypatch):
    update = TurboQuantCache.update

    def broken(self, *args, **kwargs):
        states = update(self, *args, **kwargs)
        torch._dynamo.graph_break()
        return states

    def logits(forward):
        cache = TurboQuantCache(one_layer.config)
        with torch.no_grad():
            return torch.cat([forward(ids(2, n), past_key_values=cache).logits for n in (20, 1)], dim=1)

    expected = logits(one_layer)
    monkeypatch.setattr(TurboQuantCache, "update", broken)
    torch.testing.assert_close(logits(torch.compile(one_layer, backend="eager")), expected, rtol=1e-4, atol=1e-4)


def test_placeholders_are_never_handed_to_somebody_else(tiny_model):
    cache = TurboQuantCache(tiny_model.config)
    keys, values = cache.update(*torch.randn(2, 2, 2, 20, 64), 0)
    assert not isinstance(keys, Placeholder)
    assert not isinstance(values, Placeholder)
