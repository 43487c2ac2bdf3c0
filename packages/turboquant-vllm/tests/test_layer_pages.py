"""Layers with bits of their own, from a file of `turboquant tune`, and layers that stay uncompressed."""

from types import SimpleNamespace

import pytest
import transformers
from vllm.config import ModelConfig

from turboquant_core.layer_bits import LayerBits, write_layer_bits
from turboquant_core.model_identity import ModelIdentity
from turboquant_vllm._compat.engine import AttentionLayerBase
from turboquant_vllm.artifacts import layer_bits_of
from turboquant_vllm.backend import TurboQuantBackend
from turboquant_vllm.layer_pages import LayerPages, leave_to
from turboquant_vllm.settings import Settings

MIXED = {0: (8, 8), 1: (6, 8), 2: (8, 8), 3: (8, 6)}
TOKENS = [{"prompt_token_ids": list(range(start, 400, 3))} for start in (3, 5)]
TINY = {"skip_tokenizer_init": True, "max_tokens": 30, "max_num_batched_tokens": 64, "max_num_seqs": 8}


def write_bits(path, folder, bits):
    identity = ModelIdentity.of(transformers.AutoConfig.from_pretrained(folder).get_text_config(), "theirs")
    write_layer_bits(path, LayerBits(bits, identity, str(folder)))
    return str(path)


def model_config(folder):
    return ModelConfig(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=256)


def test_layers_of_one_kind_have_pages_of_their_own_sizes(generate, tiny_model, tmp_path, assert_near):
    folder = tiny_model("Llama")
    settings = {"turboquant": {"layer_bits": write_bits(tmp_path / "bits.json", folder, MIXED)}}
    expected = generate(TOKENS, model=folder, **TINY)
    found = generate(
        TOKENS, model=folder, **TINY, attention_backend="CUSTOM", additional_config=settings, rounds=2,
        forced=expected["tokens"][0],
    )  # fmt: skip
    # The second round reads pages of the first.
    assert min(found["cached"][1]) >= 112
    assert_near(found, expected)
    # At head_dim 64 a key or value takes 512 / 2 bytes of float32, or eight for each bit and two for its scale.
    slots = [8 * (key_bits + value_bits) + 4 for key_bits, value_bits in MIXED.values()]
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(4 * 512 / sum(slots), rel=0.01)


def test_vllm_tells_backends_of_other_bits_apart():
    names = {TurboQuantBackend.with_bits(*pair).full_cls_name() for pair in [(4, 3), (3, 4)]} | {
        TurboQuantBackend.full_cls_name()
    }
    assert len(names) == 3
    assert TurboQuantBackend.with_bits(4, 3) is TurboQuantBackend.with_bits(4, 3)


def test_bits_that_the_kernels_do_not_read_are_refused(tiny_model, tmp_path):
    folder = tiny_model("Llama")
    path = write_bits(tmp_path / "bits.json", folder, {**MIXED, 2: (3.5, 4)})
    with pytest.raises(ValueError, match=r'has 3.5 and 4 bits for layer 2.*whole bits.*Leave "layer_bits" out'):
        layer_bits_of(model_config(folder), path)


def test_the_file_of_another_model_is_refused(tiny_model, tmp_path):
    path = write_bits(tmp_path / "bits.json", tiny_model("Llama"), MIXED)
    with pytest.raises(ValueError, match=r"this model is another.*model_type llama and gpt_oss.*turboquant tune"):
        layer_bits_of(model_config(tiny_model("GptOss")), path)


class Layer(AttentionLayerBase):
    """A layer as vLLM builds it."""

    def __init__(self, window=None):
        self.impl, self.sliding_window, self.attn_backend = object(), window, TurboQuantBackend

    def get_attn_backend(self):
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config):
        raise NotImplementedError


def pages(layers, bits=None, skipped=()):
    """What layers store; by default what the settings say."""
    identity = ModelIdentity("theirs", "llama", 4, 128, 4, 500, (1e4,), (1.0,))
    return LayerPages(bits and LayerBits(bits, identity, "theirs"), skipped, layers)


def give(bits, layers):
    """Give every layer its bits, as each asks for them."""
    every = pages(layers, bits)
    return [every.give_bits(*every.layer_of(layer.impl)) for layer in layers.values()]


def layers_with_windows(*windows):
    return {f"model.layers.{index}.self_attn.attn": Layer(window) for index, window in enumerate(windows)}


@pytest.mark.parametrize("windows", [(None, None), (64, 64)])
def test_a_layer_asks_for_pages_of_its_bits(windows):
    layers = layers_with_windows(*windows)
    assert give({0: (4, 3), 1: (6, 4)}, layers) == [(4, 3), (6, 4)]
    assert [layer.get_attn_backend().layer_bits for layer in layers.values()] == [(4, 3), (6, 4)]


def test_layers_of_several_kinds_have_the_same_bits_or_are_refused():
    assert give({0: (4, 3), 1: (4, 3)}, layers_with_windows(None, 64)) == [(4, 3)] * 2
    with pytest.raises(ValueError, match=r"bits of theirs differ.*layers without a window and windows of 64"):
        give({0: (4, 3), 1: (6, 4)}, layers_with_windows(None, 64))


def test_a_layer_that_the_file_does_not_know_is_refused():
    with pytest.raises(ValueError, match="have none for layer 1"):
        give({0: (4, 3)}, layers_with_windows(None, None))


@pytest.mark.parametrize(
    ("skipped", "windows", "expected"),
    [
        (("1", "2"), (None, None, None), [False, True, True]),
        (("1",), (64, 64), [False, True]),
        (("sliding_window",), (64, 64), [True, True]),
        (("sliding_window",), (None, None), [False, False]),
    ],
)
def test_layers_are_skipped_as_vllm_names_them(skipped, windows, expected):
    layers = layers_with_windows(*windows)
    every = pages(layers, skipped=skipped)
    assert [every.is_skipped(*every.layer_of(layer.impl)) for layer in layers.values()] == expected


@pytest.mark.parametrize("bits", [None, {0: (4, 3), 1: (6, 4)}])
def test_layers_of_several_kinds_are_all_compressed_or_refused(bits):
    layers = layers_with_windows(None, 64)
    with pytest.raises(ValueError, match=r"layers 1, sliding_window are to stay un.*Leave --kv-cache-dtype-skip"):
        pages(layers, bits, ("1", "sliding_window")).layer_of(layers["model.layers.0.self_attn.attn"].impl)


class Mamba(Layer):
    """A layer that has no window and no implementation."""

    def __init__(self):
        super().__init__()
        del self.impl, self.sliding_window


def test_layers_of_another_kind_are_named():
    layers = {"model.layers.0.mixer": Mamba(), **layers_with_windows(None, None)}
    every = pages(layers, {0: (4, 3), 1: (4, 3)})
    name = "model.layers.1.self_attn.attn"
    assert every.layer_of(layers[name].impl) == (name, layers[name])
    with pytest.raises(ValueError, match=r"has Mamba layers and layers without a window, whose pages"):
        pages(layers, skipped=("1",)).layer_of(layers[name].impl)


def engine(skipped=(), model=None):
    """What of an engine's configuration says what its layers store."""
    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_dtype_skip_layers=list(skipped)),
        model_config=model,
        compilation_config=SimpleNamespace(static_forward_context=layers_with_windows(None, None)),
    )


def test_an_engine_says_which_layers_are_unlike_others(tiny_model, tmp_path):
    folder = tiny_model("Llama")
    tuned = Settings(layer_bits=write_bits(tmp_path / "bits.json", folder, MIXED))
    assert LayerPages.of_engine(None, tuned) is None
    assert LayerPages.of_engine(engine(), Settings()) is None
    config = engine(["0"], model_config(folder))
    layers = config.compilation_config.static_forward_context
    assert LayerPages.of_engine(config, Settings()) == LayerPages(None, ("0",), layers)
    config.cache_config.kv_cache_dtype_skip_layers = []
    found = LayerPages.of_engine(config, tuned)
    assert (found.skipped, found.layers) == ((), layers)
    assert found.bits.layer_bits == MIXED


def test_a_layer_is_left_to_another_backend():
    backend = SimpleNamespace(get_impl_cls=lambda: lambda *arguments, **named: (arguments, named))
    layer = Layer()
    assert leave_to(backend, layer, 4, 64, sinks=None) == ((4, 64), {"sinks": None})
    assert (layer.attn_backend, layer.impl) == (backend, ((4, 64), {"sinks": None}))


def test_skipped_layers_are_left_to_vllms_own_backend(generate, tiny_model, itemsize, assert_near):
    folder = tiny_model("Llama")
    eight_bits = {"turboquant": {"key_bits": 8, "value_bits": 8}}
    expected = generate(TOKENS, model=folder, **TINY)
    found = generate(
        TOKENS, model=folder, **TINY, attention_backend="CUSTOM", additional_config=eight_bits, rounds=2,
        kv_cache_dtype_skip_layers=["0", "3"], forced=expected["tokens"][0],
    )  # fmt: skip
    assert min(found["cached"][1]) >= 96
    assert_near(found, expected)
    whole = 128 * itemsize
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(4 * whole / (2 * whole + 2 * 132), rel=0.01)
