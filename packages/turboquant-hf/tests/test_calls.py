"""Calls that stop between the layers of a cache or inside one, and threads that share a cache."""

import copy
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from turboquant_hf import CompressedDynamicCache, TurboQuantCache
from turboquant_hf._compat import Cache
from turboquant_hf.calls import attention_lengths
from turboquant_hf.storage import pages
from turboquant_hf.storage.full_precision import FullPrecision

LENGTH = 40
EXACT = {"key_bits": 8, "value_bits": 8}
CACHES = {
    "growing": {},
    "codes only": {"sink_tokens": 0, "recent_tokens": 0},
    "static": {"max_length": 128},
    "tq2.5": {"preset": "tq2.5"},
    "native first layer": {"skip_layers": [0]},
    "native last layer": {"skip_layers": [-1]},
}


class Interrupted(KeyboardInterrupt):
    """What a test raises in the middle of a forward pass."""


@pytest.fixture(scope="module")
def llama(tiny_config):
    torch.manual_seed(7)
    return LlamaForCausalLM(tiny_config(num_hidden_layers=4, vocab_size=128)).eval()


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, llama):
    model = copy.deepcopy(llama)
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(scope="module")
def mistral(tiny_config):
    torch.manual_seed(7)
    config = tiny_config(MistralConfig, num_hidden_layers=3, vocab_size=128, sliding_window=16)
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def hybrid(tiny_config):
    config = tiny_config(
        Qwen3NextConfig,
        vocab_size=128,
        num_hidden_layers=4,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    torch.manual_seed(7)
    return Qwen3NextForCausalLM(config).eval()


def ids(num_tokens, seed=1, batch_size=2):
    return torch.randint(1, 128, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


def forward(model, tokens, cache):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


def interrupt(model, tokens, cache, layer=2):
    """A forward pass that ends before a layer."""

    def stop(*_):
        raise Interrupted

    hook = model.model.layers[layer].register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        forward(model, tokens, cache)
    hook.remove()


def lengths(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


def filled(model, **options):
    cache = TurboQuantCache(model.config, **options)
    forward(model, ids(LENGTH), cache)
    return cache


def wrapped(model, with_config, num_tokens=LENGTH):
    """A DynamicCache that is compressed; without a configuration its layers are made as they come."""
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    compressed = CompressedDynamicCache(cache, head_dim=model.config.head_dim, model_config=model.config)
    if num_tokens:
        forward(model, ids(num_tokens), cache)
    return cache, compressed


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("num_tokens", [1, 3, 12])
def test_a_call_that_stopped_between_layers_is_refused_until_it_is_taken_back(model, options, num_tokens):
    cache, expected = filled(model, **options), filled(model, **options)
    interrupt(model, ids(num_tokens, seed=2), cache)
    disagreement = rf"hold \[{LENGTH + num_tokens}, {LENGTH + num_tokens}, 40, 40\] tokens: .*crop\(-{num_tokens}\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=disagreement):
            forward(model, ids(4, seed=3), cache)
    cache.crop(-num_tokens)
    assert lengths(cache) == [LENGTH] * 4
    for num_new in (4, 1):
        actual = forward(model, ids(num_new, seed=3), cache)
        wanted = forward(model, ids(num_new, seed=3), expected)
        if num_tokens <= 8:
            torch.testing.assert_close(actual, wanted)
        else:
            # What had left the window is read from its codes.
            assert (actual - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("options", [EXACT, {**EXACT, "max_length": 128}], ids=["growing", "static"])
def test_a_longer_call_that_stopped_is_taken_back(model, options):
    cache, expected = filled(model, **options), filled(model, **options)
    interrupt(model, ids(20, seed=2), cache)
    cache.crop(-20)
    actual, wanted = (forward(model, ids(4, seed=3), which) for which in (cache, expected))
    assert (actual - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("options", [{}, {"max_length": 128}], ids=["growing", "static"])
def test_crop_takes_back_more_than_the_interrupted_call(model, options):
    cache = filled(model, **options)
    interrupt(model, ids(3, seed=2), cache)
    cache.crop(-5)
    assert lengths(cache) == [LENGTH - 2] * 4
    expected = filled(model, **options)
    expected.crop(-2)
    assert torch.equal(forward(model, ids(2, seed=3), cache), forward(model, ids(2, seed=3), expected))


def test_crop_to_more_than_all_layers_have_is_refused(model):
    cache = filled(model)
    interrupt(model, ids(3, seed=2), cache)
    for tokens_to_remove in (0, -2):
        with pytest.raises(RuntimeError, match=r"hold \[43, 43, 40, 40\]"):
            cache.crop(tokens_to_remove)
    assert lengths(cache) == [43, 43, 40, 40]


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_an_interrupted_prompt_is_refused_until_reset(model, options):
    cache = TurboQuantCache(model.config, **options)
    interrupt(model, ids(LENGTH, seed=2), cache)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"hold \[4\d, 4\d, 0.*reset\(\)") as refused:
            forward(model, ids(1, seed=3), cache)
        assert "crop" not in str(refused.value)
    expected = filled(model, **options)
    cache.reset()
    forward(model, ids(LENGTH), cache)
    assert torch.equal(forward(model, ids(4, seed=3), cache), forward(model, ids(4, seed=3), expected))


@pytest.mark.parametrize("options", [{}, {"max_length": 128}], ids=["growing", "static"])
def test_an_interrupted_prompt_is_cropped_to_nothing(model, options):
    cache = TurboQuantCache(model.config, **options)
    interrupt(model, ids(LENGTH, seed=2), cache)
    cache.crop(-LENGTH)
    forward(model, ids(LENGTH), cache)
    assert torch.equal(forward(model, ids(4, seed=3), cache), forward(model, ids(4, seed=3), filled(model, **options)))


def test_what_disagrees_is_not_saved(model, tmp_path):
    cache = filled(model)
    interrupt(model, ids(3, seed=2), cache)
    with pytest.raises(RuntimeError, match=r"crop\(-3\)"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_copy_is_refused_as_well(model):
    cache = filled(model)
    interrupt(model, ids(3, seed=2), cache)
    with pytest.raises(RuntimeError, match=r"crop\(-3\)"):
        forward(model, ids(1, seed=3), copy.deepcopy(cache))


@pytest.mark.parametrize(("record", "max_length"), [(False, None), (True, None), (False, 128)])
@pytest.mark.parametrize("prompt", [10, LENGTH])
def test_windows_are_taken_back_or_say_that_they_cannot_be(mistral, prompt, record, max_length):
    def new():
        cache = TurboQuantCache(mistral.config, max_length=max_length, **EXACT)
        if record:
            cache.activate_past_recording()
        forward(mistral, ids(prompt), cache)
        return cache

    cache, expected = new(), new()
    interrupt(mistral, ids(3, seed=2), cache, layer=1)
    with pytest.raises(RuntimeError, match=r"crop\(-3\)"):
        forward(mistral, ids(2, seed=3), cache)
    cache.crop(-3)
    assert torch.equal(forward(mistral, ids(2, seed=3), cache), forward(mistral, ids(2, seed=3), expected))


def test_a_window_that_cannot_be_taken_back_leaves_nothing_half_done(mistral):
    cache = TurboQuantCache(mistral.config, **EXACT)
    forward(mistral, ids(LENGTH), cache)
    for seed in range(80):
        forward(mistral, ids(1, seed=seed), cache)
    with pytest.raises(RuntimeError, match="have left the window"):
        cache.crop(-90)
    assert lengths(cache) == [LENGTH + 80] * 3
    forward(mistral, ids(1), cache)


def test_a_window_after_another_layer_is_asked_first(tiny_config):
    config = tiny_config(Gemma3TextConfig, sliding_window=16, layer_types=["full_attention", "sliding_attention"])
    cache = TurboQuantCache(config)
    for num_tokens in (90, 1):
        for index in range(2):
            cache.update(*torch.randn(2, 1, 2, num_tokens, 64), index)
    with pytest.raises(RuntimeError, match="have left the window"):
        cache.crop(-60)
    assert lengths(cache) == [91] * 2


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("prompt", [0, LENGTH])
def test_linear_attention_takes_nothing_back(hybrid, layer, prompt):
    cache = TurboQuantCache(hybrid.config)
    if prompt:
        forward(hybrid, ids(prompt), cache)
        forward(hybrid, ids(1), cache)
    interrupt(hybrid, ids(3, seed=2), cache, layer=layer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"stopped between .*reset\(\)"):
            forward(hybrid, ids(1, seed=3), cache)
    with pytest.raises(RuntimeError):
        cache.crop(-3)
    cache.reset()
    forward(hybrid, ids(LENGTH), cache)
    expected = filled(hybrid)
    for seed in range(3):
        assert torch.equal(forward(hybrid, ids(1, seed=seed), cache), forward(hybrid, ids(1, seed=seed), expected))


def test_a_graph_is_given_what_a_call_is(llama, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    states = torch.randn(2, 1, 2, LENGTH, 64)
    read = TurboQuantCache(llama.config).update(*states, 0)
    assert all(map(torch.equal, read, states))


def test_nothing_is_taken_back_from_nothing(model):
    cache = TurboQuantCache(model.config)
    cache.crop(-1)
    assert lengths(cache) == [0] * 4


def test_lengths_are_numbers(model):
    for options in CACHES.values():
        assert all(type(length) is int for length in attention_lengths(filled(model, **options).layers).values())


@pytest.mark.parametrize("is_compiling", [False, True])
def test_a_layer_is_handed_what_a_model_says_beside_its_states(llama, is_compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    cache, (keys, values) = TurboQuantCache(llama.config), torch.randn(2, 1, 2, 3, 64)
    monkeypatch.setattr(cache.layers[1], "update", lambda *given, **named: (given, named))
    assert cache.update(keys, values, 1, {"sin": 0}, name=1) == ((keys, values, {"sin": 0}), {"name": 1})


@pytest.mark.parametrize(
    "name", ["get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state"]
)
def test_linear_attention_is_handed_its_states_as_they_come(hybrid, name, monkeypatch):
    # Older versions have no methods that read a state.
    monkeypatch.setattr(Cache, name, lambda _, *given, **named: (given, named), raising=False)
    cache = TurboQuantCache(hybrid.config)
    given, named = (0, 1), {"conv_kernel_size": 4}
    if name.startswith("update"):
        given = (torch.zeros(1), *given)
    assert getattr(cache, name)(*given, **named) == (given, named)
    if name.startswith("update"):
        # Another call, and the one before has not reached the other layers.
        with pytest.raises(RuntimeError, match="stopped between"):
            getattr(cache, name)(*given, **named)


@pytest.mark.parametrize("options", [{}, {"max_length": 128}], ids=["growing", "static"])
@pytest.mark.parametrize("num_tokens", [1, 3, 12])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("where", [(pages, "write_pages"), (FullPrecision, "write")], ids=["codes", "window"])
def test_a_call_that_stopped_inside_a_layer(model, options, num_tokens, layer, where, monkeypatch):
    options = {**EXACT, **options}
    cache, expected = filled(model, **options), filled(model, **options)
    store, (owner, name) = cache.layers[layer].store, where
    function = getattr(owner, name)

    def stop(first, *args):
        function(first, *args)
        if first is store.pages.tensor or first is store.full_precision:
            raise Interrupted

    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(Interrupted):
        forward(model, ids(num_tokens, seed=2), cache)
    monkeypatch.undo()
    if layer:
        with pytest.raises(RuntimeError, match=rf"crop\(-{num_tokens}\)"):
            forward(model, ids(4, seed=3), cache)
        cache.crop(-num_tokens)
    assert lengths(cache) == [LENGTH] * 4
    actual, wanted = (forward(model, ids(4, seed=3), which) for which in (cache, expected))
    if num_tokens <= 8:
        torch.testing.assert_close(actual, wanted)
    else:
        assert (actual - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("options", [{}, {"max_length": 128}], ids=["growing", "static"])
def test_an_interrupted_prompt_calibrates_nothing(model, options, monkeypatch):
    cache, expected = TurboQuantCache(model.config, **options), filled(model, **options)

    def stop(*_):
        raise Interrupted

    monkeypatch.setattr(pages, "write_pages", stop)
    with pytest.raises(Interrupted):
        forward(model, ids(LENGTH, seed=2), cache)
    monkeypatch.undo()
    forward(model, ids(LENGTH), cache)
    assert torch.equal(forward(model, ids(4, seed=3), cache), forward(model, ids(4, seed=3), expected))


@pytest.mark.parametrize(("operation", "argument"), [("reorder_cache", torch.tensor([1, 0])), ("crop", -2)])
@pytest.mark.parametrize("layer", [1, 3])
def test_an_operation_that_stopped_is_refused_until_reset(model, operation, argument, layer, monkeypatch):
    cache = filled(model)

    def stop(*_):
        raise Interrupted

    monkeypatch.setattr(cache.layers[layer], operation, stop)
    with pytest.raises(Interrupted):
        getattr(cache, operation)(argument)
    with pytest.raises(RuntimeError, match=rf"{operation} stopped between the layers .*reset\(\)"):
        forward(model, ids(1), cache)
    cache.reset()
    forward(model, ids(LENGTH), cache)
    assert torch.equal(forward(model, ids(1), cache), forward(model, ids(1), filled(model)))


@pytest.mark.parametrize("with_config", [False, True])
def test_a_wrapped_cache_refuses_what_stopped_between_layers(model, with_config):
    (cache, compressed), (expected, _) = wrapped(model, with_config), wrapped(model, with_config)
    interrupt(model, ids(3, seed=2), cache)
    for which in (cache, copy.deepcopy(cache)):
        with pytest.raises(RuntimeError, match=r"hold \[43, 43, 40, 40\] tokens: .*crop\(-3\)"):
            forward(model, ids(1, seed=3), which)
    with pytest.raises(RuntimeError, match=r"crop\(-3\)"):
        compressed.restore()
    cache.crop(-3)
    assert torch.equal(forward(model, ids(4, seed=3), cache), forward(model, ids(4, seed=3), expected))
    compressed.restore()
    assert type(cache) is DynamicCache
    forward(model, ids(1), cache)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_interrupted_prompt_of_a_wrapped_cache_is_refused_until_reset(model, with_config):
    cache, _ = wrapped(model, with_config, num_tokens=0)
    interrupt(model, ids(LENGTH, seed=2), cache)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"hold \[4\d, 4\d, 0\].*reset\(\)"):
            forward(model, ids(1, seed=3), cache)
    expected, _ = wrapped(model, with_config)
    cache.reset()
    forward(model, ids(LENGTH), cache)
    assert torch.equal(forward(model, ids(4, seed=3), cache), forward(model, ids(4, seed=3), expected))


def test_an_error_in_the_block_leaves_the_wrapped_cache_compressed(model):
    cache, compressed = wrapped(model, with_config=True)
    interrupt(model, ids(3, seed=2), cache)
    with pytest.raises(ZeroDivisionError), compressed:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match=r"crop\(-3\)"):
        forward(model, ids(1), cache)


@pytest.mark.parametrize("new", [filled, lambda model: wrapped(model, with_config=False)[0]], ids=["own", "wrapped"])
@pytest.mark.parametrize("place", ["inside the first layer", "inside a later layer", "between layers"])
def test_two_threads_at_once_are_refused(model, new, place, monkeypatch):
    cache = new(model)
    errors, other_is_done = [], []

    def other():
        try:
            forward(model, ids(1, seed=5), cache)
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(*_):
        if not other_is_done:
            other_is_done.append(True)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    if place == "between layers":
        hook = model.model.layers[2].register_forward_pre_hook(meanwhile)
    else:
        layer = cache.layers[0 if place == "inside the first layer" else 2]
        update = layer.update
        monkeypatch.setattr(layer, "update", lambda *args, **kwargs: (meanwhile(), update(*args, **kwargs))[1])
    actual = forward(model, ids(1, seed=2), cache)
    if place == "between layers":
        hook.remove()
    monkeypatch.undo()
    assert len(errors) == 1
    assert ("in the middle of one" if place == "between layers" else "another thread is inside") in errors[0]
    # The one that came first is served, and one after another they may.
    assert torch.equal(actual, forward(model, ids(1, seed=2), filled(model)))
    threads = [threading.Thread(target=other) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert lengths(cache) == [LENGTH + 3] * 4
