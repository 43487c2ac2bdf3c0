import copy
import gc

import pytest
import torch
from transformers import (
    BertConfig,
    DynamicCache,
    FalconMambaConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    T5Config,
)

from turboquant_core import PRESETS, TurboQuantConfig
from turboquant_core.quantized import storage_nbytes
from turboquant_hf import TurboQuantCache
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer


def generate(model, prompt, cache, **kwargs):
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(prompt, past_key_values=cache, **arguments)


@pytest.mark.parametrize("preset", PRESETS)
def test_generates_with_every_preset(tiny_model, prompt, preset):
    cache = TurboQuantCache(tiny_model.config, preset)
    output = generate(tiny_model, prompt, cache)
    assert output.shape == (2, 60)
    assert cache.get_seq_length() == 59


def test_eight_bits_say_what_the_uncompressed_cache_says(tiny_model, prompt, assert_says_the_same):
    cache = TurboQuantCache(tiny_model.config, key_bits=8, value_bits=8)
    assert_says_the_same(tiny_model, prompt, cache, DynamicCache(config=tiny_model.config))


@pytest.mark.parametrize(
    ("head_dim", "preset", "bytes_of_a_slot", "compression"),
    [
        (128, "tq4", 132, 3.88),
        (128, "tq3", 100, 5.12),
        (128, "tq2", 68, 7.53),
        (128, "k6v4", 164, 3.12),
        (128, "k8v4", 196, 2.61),
        (64, "tq4", 68, 3.76),
        (64, "tq3", 52, 4.92),
        (64, "tq2", 36, 7.11),
    ],
)
def test_measured_bytes(tiny_config, head_dim, preset, bytes_of_a_slot, compression):
    config = tiny_config(head_dim=head_dim)
    cache = TurboQuantCache(config, preset, center_keys=False, sink_tokens=0, recent_tokens=0)
    num_tokens = 512
    for layer_idx in range(config.num_hidden_layers):
        states = torch.randn(1, config.num_key_value_heads, num_tokens, head_dim, dtype=torch.bfloat16)
        cache.update(states, states, layer_idx)
    slots = num_tokens * config.num_key_value_heads * config.num_hidden_layers
    assert cache.nbytes / slots == bytes_of_a_slot
    report = cache.memory_report()
    assert report.compression == pytest.approx(compression, abs=0.005)
    assert {layer.reserved_nbytes for layer in report.layers} == {0}


def test_no_other_full_precision_copy_survives_a_step(tiny_model, prompt):
    cache = TurboQuantCache(tiny_model.config, sink_tokens=2, recent_tokens=3)
    generate(tiny_model, prompt, cache)
    gc.collect()
    reachable, seen = [cache], set()
    tensors = []
    while reachable:
        item = reachable.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif hasattr(item, "__dict__"):
            reachable += vars(item).values()
        elif isinstance(item, list | tuple):
            reachable += item
    assert storage_nbytes(tensors) == cache.nbytes
    slots = 2 * 64 * 2 * 2  # sequences, tokens of a block, heads, layers
    mean_nbytes = 2 * 2 * 2 * 64 * 4
    kept_nbytes = 2 * 2 * 2 * 2 * 64 * 4 * (2 + 3 + 8 + 1)
    assert cache.nbytes == slots * 68 + mean_nbytes + kept_nbytes


def test_a_second_turn_continues_from_the_codes(tiny_model, prompt):
    cache = TurboQuantCache(tiny_model.config)
    first = generate(tiny_model, prompt, cache)
    held = cache.get_seq_length()
    second = generate(tiny_model, torch.cat([first, prompt], dim=1), cache)
    assert second.shape == (2, 60 + 40 + 20)
    assert cache.get_seq_length() == held + 1 + 40 + 19


def test_sliding_window_layers_compress_within_their_window(assert_says_the_same):
    config = Gemma3TextConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(1)
    model = Gemma3ForCausalLM(config).eval()
    cache = TurboQuantCache(config, key_bits=8, value_bits=8)
    assert [isinstance(layer, TurboQuantSlidingLayer) for layer in cache.layers] == [True, False] * 2
    prompt = torch.randint(200, (1, 30), generator=torch.Generator().manual_seed(1))
    # Its random weights magnify a difference.
    assert_says_the_same(model, prompt, cache, DynamicCache(config=config), tolerance=0.05)
    assert {layer.kind for layer in cache.memory_report().layers} == {"turboquant 8/8 bits"}


def test_mixed_head_dims_are_learnt_by_layer(tiny_config):
    cache = TurboQuantCache(tiny_config())
    for layer_idx, head_dim in enumerate((64, 128)):
        states = torch.randn(1, 2, 10, head_dim)
        cache.update(states, states, layer_idx)
    assert [layer.config.head_dim for layer in cache.layers] == [64, 128]


def test_fields_override_the_preset(tiny_config):
    cache = TurboQuantCache(tiny_config(), "k6v4", value_bits=3, center_keys=False, value_scale="norm")
    states = torch.randn(1, 2, 10, 64)
    cache.update(states, states, 0)
    assert cache.layers[0].config == TurboQuantConfig(
        64, key_bits=6, value_bits=3, center_keys=False, value_scale="norm"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "tq9"}, "preset is 'tq9'; it must be one of tq4, "),
        ({"key_bits": 7}, "key_bits is 7; it must be one of 2, "),
        ({"value_bits": 16}, "value_bits is 16"),
        ({"key_bits": "8"}, "key_bits is '8'; it must be one of 2, "),
        ({"preset": ["tq4"]}, r"preset is \['tq4'\]; it must be one of tq4, "),
        ({"max_length": 0}, "max_length is 0; it must be an int of at least 1"),
        ({"max_length": -5}, "max_length is -5"),
        ({"max_length": 2.5}, "max_length is 2.5"),
        ({"max_length": "9"}, "max_length is '9'"),
        ({"max_length": True}, "max_length is True"),
        ({"skip_layers": 0}, r"skip_layers is 0; write the indices of layers, such as \[0, -1\]"),
        ({"skip_layers": [True]}, "skip_layers names layer True"),
        ({"layer_bits": 5}, r"layer_bits is 5; write \{0: \(key_bits, value_bits\)\}"),
        ({"layer_bits": {True: (4, 4)}}, "layer_bits names layer True"),
        ({"layer_bits": {0: ("4", 4)}}, "key_bits is '4'; it must be one of 2, "),
        ({"layer_bits": {0: (4, 4), -2: (8, 4)}}, "layer_bits names layer 0 twice, once as -2; leave one of them out"),
        ({"key_scale": "mean"}, "scale rule is 'mean'; it must be one of norm, unbiased, least_squares"),
    ],
)
def test_unknown_options_are_refused_at_once(tiny_config, arguments, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(tiny_config(), **arguments)


@pytest.mark.parametrize("name", ["nosuch", "head_dim", "unknown"])
def test_an_option_that_there_is_not_is_refused_with_those_there_are(tiny_config, name):
    given = {name: 64}
    with pytest.raises(TypeError, match=f"TurboQuantCache has no option '{name}'; it has preset, .*center_keys"):
        TurboQuantCache(tiny_config(), **given)


def test_what_other_caches_call_residual_length_is_named(tiny_config):
    with pytest.raises(
        TypeError, match="no option 'residual_length'; what other caches call residual_length is recent"
    ):
        TurboQuantCache(tiny_config(), residual_length=128)


def test_max_cache_len_is_max_length(tiny_config):
    cache = TurboQuantCache(tiny_config(), max_cache_len=70)
    assert cache.get_max_length() == 70
    assert cache.is_compileable
    with pytest.raises(ValueError, match="max_length is 70 and max_cache_len 80, two names of one option; give one"):
        TurboQuantCache(tiny_config(), max_length=70, max_cache_len=80)
    with pytest.raises(ValueError, match="max_length is 0; it must be an int of at least 1"):
        TurboQuantCache(tiny_config(), max_cache_len=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(head_dim=20), "head_dim is 20; it must be a multiple of 8"),
        (BertConfig(), "bert model is an encoder, which keeps no KV cache"),
        (T5Config(), "t5 model is an encoder-decoder"),
        (FalconMambaConfig(), "falcon_mamba model names no num_attention_heads"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_it_cannot_hold_are_refused_at_once(config, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(config)


def test_a_model_instead_of_its_config_is_refused(tiny_model):
    with pytest.raises(TypeError, match=r"config is LlamaForCausalLM; pass the model's configuration, model.config"):
        TurboQuantCache(tiny_model)


def test_single_layers_may_keep_full_precision_or_have_bits_of_their_own(tiny_model, prompt):
    config = tiny_model.config
    cache = TurboQuantCache(config, skip_layers=[0], layer_bits={-1: (8, 3)})
    generate(tiny_model, prompt, cache)
    assert [layer.kind for layer in cache.memory_report().layers] == ["DynamicLayer", "turboquant 8/3 bits"]
    with pytest.raises(ValueError, match=r"no attention layer to compress that is not in skip_layers \[0, 1\]"):
        TurboQuantCache(config, skip_layers=[0, -1])
    with pytest.raises(ValueError, match="skip_layers names layer 2; this model has 2 layers"):
        TurboQuantCache(config, skip_layers=[2])
    with pytest.raises(ValueError, match="skip_layers names layer '0'"):
        TurboQuantCache(config, skip_layers="0")
    with pytest.raises(ValueError, match="layer_bits names layer -3"):
        TurboQuantCache(config, layer_bits={-3: (4, 4)})
    with pytest.raises(ValueError, match=r"layer_bits of layer 0 are 8; write \(key_bits, value_bits\)"):
        TurboQuantCache(config, layer_bits={0: 8})
    with pytest.raises(ValueError, match="layer -2 is in layer_bits and in skip_layers"):
        TurboQuantCache(config, layer_bits={-2: (8, 4)}, skip_layers=[0])
    with pytest.raises(ValueError, match="value_bits is 9"):
        TurboQuantCache(config, layer_bits={0: (4, 9)})


def test_bits_of_a_layer_that_is_not_compressed_are_refused():
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    TurboQuantCache(config, layer_bits={1: (8, 4)})
    with pytest.raises(ValueError, match="layer_bits names layer 0, a LinearAttentionLayer, which is not compressed"):
        TurboQuantCache(config, layer_bits={0: (8, 4)})


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2), "LinearAttentionLayer"),
        (LlamaConfig(num_hidden_layers=0), "none"),
    ],
    ids=["linear", "none"],
)
def test_a_model_without_attention_is_refused(config, layers):
    message = rf"{config.model_type} model has no attention layer to compress \(its layers: {layers}\)\. Use Dynamic"
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(config)


def test_fractional_bits_refuse_a_head_dim_they_cannot_split(tiny_config):
    with pytest.raises(ValueError, match=r"head_dim is 80; 2.5 bits .* multiple of 32"):
        TurboQuantCache(tiny_config(head_dim=80), "tq2.5")


def test_head_dim_is_derived_where_the_config_has_none():
    config = LlamaConfig(hidden_size=96, num_attention_heads=3, num_hidden_layers=1, vocab_size=50)
    model = LlamaForCausalLM(config).eval()
    cache = TurboQuantCache(config)
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert cache.layers[0].config.head_dim == 32


@pytest.mark.parametrize("options", [{}, {"max_length": 70}])
def test_a_type_that_whole_bits_do_not_hold_is_refused_with_the_first_tokens(tiny_model, options):
    model = copy.deepcopy(tiny_model).double()
    prompt = torch.randint(1, 1500, (1, 12), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"keys are torch.float64; a cache of 4 and 4 bits .* dtype=torch.float32"):
        model(prompt, past_key_values=TurboQuantCache(model.config, **options))


def test_fractional_bits_hold_keys_in_float64(tiny_model):
    model = copy.deepcopy(tiny_model).double()
    prompt = torch.randint(1, 1500, (1, 24), generator=torch.Generator().manual_seed(1))
    cache = TurboQuantCache(model.config, "tq3.5")
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        logits = model(prompt[:, :1], past_key_values=cache).logits
    assert logits.dtype == torch.float64
    assert logits.isfinite().all()
