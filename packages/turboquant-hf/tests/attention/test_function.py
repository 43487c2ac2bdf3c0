import copy
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from turboquant_core import TurboQuantConfig
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import AttentionInterface, AttentionMaskInterface
from turboquant_hf.attending import attending
from turboquant_hf.attention.function import register, turboquant_attention
from turboquant_hf.attention.handover import Stored, hand_over
from turboquant_hf.attention.masks import turboquant_mask
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import MAX_STEP_TOKENS, FullPrecisionSizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Kernels multiply in float16 what the reference multiplies in float32.
TOLERANCE = 1e-3 if DEVICE.type == "cpu" else 2e-2


@pytest.fixture
def tiny_model(tiny_model):
    return copy.deepcopy(tiny_model).to(DEVICE)


@pytest.fixture
def prompt(prompt):
    return prompt.to(DEVICE)


@pytest.fixture
def fused_model(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    return model


@pytest.fixture
def no_dequantizing(monkeypatch):
    def refuse(self, dtype, **_):
        raise AssertionError("history was dequantised")

    monkeypatch.setattr(Store, "_read", refuse)


def generate(model, prompt, cache, **kwargs):
    arguments = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
        **kwargs,
    }
    return model.generate(prompt, past_key_values=cache, **arguments)


def step_logits(model, prompt, chunks, mask=None, **options):
    """The logits of chunks that follow a prompt; dequantised, recent tokens of a chunk would see more of each other."""
    cache = TurboQuantCache(model.config, **{"recent_tokens": 0, **options})
    logits, length = [], prompt.shape[1]
    with torch.no_grad():
        # It alone tells a cache of padding.
        with attending(model, "turboquant"):
            model(prompt, attention_mask=None if mask is None else mask[:, :length], past_key_values=cache)
        for chunk in chunks:
            length += chunk.shape[1]
            given = None if mask is None else mask[:, :length]
            positions = None if mask is None else (mask[:, :length].cumsum(-1) - 1)[:, -chunk.shape[1] :]
            output = model(chunk, attention_mask=given, position_ids=positions, past_key_values=cache)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def assert_same_logits(model, fused, prompt, chunks, **kwargs):
    expected = step_logits(model, prompt, chunks, **kwargs)
    actual = step_logits(fused, prompt, chunks, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert expected.std() > 0.05


def tokens(*shape):
    return torch.randint(1500, shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)


@pytest.mark.parametrize("preset", ["tq4", "tq3", "k8v4"])
def test_decoding_on_codes_equals_dequantising_them(tiny_model, fused_model, prompt, preset):
    chunks = [tokens(2, n) for n in (1, 1, 5, MAX_STEP_TOKENS, 1)]
    assert_same_logits(tiny_model, fused_model, prompt, chunks, preset=preset)


def test_history_stays_codes(fused_model, prompt, no_dequantizing):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), prompt], dim=1)
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    assert generate(fused_model, padded, TurboQuantCache(fused_model.config), attention_mask=mask).shape == (2, 55)
    single = prompt[:1]
    assert generate(fused_model, single, TurboQuantCache(fused_model.config), prompt_lookup_num_tokens=3).shape[0] == 1


def test_longer_chunks_dequantise(fused_model, prompt, no_dequantizing):
    with pytest.raises(AssertionError, match="dequantised"):
        step_logits(fused_model, prompt, [tokens(2, MAX_STEP_TOKENS + 1)])


def test_longer_chunks_equal_the_unfused_path(tiny_model, fused_model, prompt):
    assert_same_logits(tiny_model, fused_model, prompt, [tokens(2, 17), tokens(2, 1)])


def test_fractional_bits_dequantise(tiny_model, fused_model, prompt):
    assert_same_logits(tiny_model, fused_model, prompt, [tokens(2, 1), tokens(2, 3)], preset="tq3.5")


def test_left_padding(tiny_model, fused_model, prompt):
    mask = torch.ones(2, 60, dtype=torch.int64, device=DEVICE)
    mask[0, :7] = 0
    assert_same_logits(tiny_model, fused_model, prompt, [tokens(2, 1), tokens(2, 4), tokens(2, 1)], mask=mask)


def test_holes_in_the_mask(tiny_model, fused_model, prompt):
    mask = torch.ones(2, 60, dtype=torch.int64, device=DEVICE)
    mask[1, 20:30] = 0
    assert_same_logits(tiny_model, fused_model, prompt, [tokens(2, 1), tokens(2, 4)], mask=mask)


def test_a_mask_of_the_callers_own(tiny_model, fused_model, prompt):
    logits = []
    for model in (tiny_model, fused_model):
        cache = TurboQuantCache(model.config, recent_tokens=0)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            mask = torch.rand(2, 1, 2, 42, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
            mask[..., -2:] = torch.eye(2, dtype=torch.bool, device=DEVICE)
            logits.append(model(tokens(2, 2), attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_cache_follows_the_model_that_uses_it(tiny_model, prompt, request):
    model = copy.deepcopy(tiny_model)
    cache = TurboQuantCache(model.config)
    generate(model, prompt, cache)
    model.set_attn_implementation("turboquant")
    cache.reset()
    request.getfixturevalue("no_dequantizing")
    generate(model, prompt, cache)


@pytest.mark.parametrize("made", [True, False])
def test_an_uncompressed_cache_works_too(fused_model, prompt, made, assert_says_the_same):
    assert_says_the_same(
        fused_model, prompt, DynamicCache(config=fused_model.config) if made else None, DynamicCache(), tolerance=1e-4
    )


def test_registering_twice_changes_nothing(fused_model, prompt):
    expected = generate(fused_model, prompt, TurboQuantCache(fused_model.config))
    register()
    assert torch.equal(generate(fused_model, prompt, TurboQuantCache(fused_model.config)), expected)


def test_both_interfaces_are_told_of_it(monkeypatch):
    told = []
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "register", lambda *given: told.append(given))
    register()
    assert told == [("turboquant", turboquant_attention), ("turboquant", turboquant_mask)]


def gpt_oss(tiny_config, attention):
    config = tiny_config(
        GptOssConfig,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
        attn_implementation=attention,
    )
    torch.manual_seed(3)
    model = GptOssForCausalLM(config).eval().to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2.0)
    return model


def gemma2(tiny_config, attention):
    config = tiny_config(
        Gemma2Config,
        sliding_window=16,
        # Logits of random weights are small: a larger cap would change nothing.
        attn_logit_softcapping=0.05,
        query_pre_attn_scalar=4,
        attn_implementation=attention,
    )
    torch.manual_seed(3)
    return Gemma2ForCausalLM(config).eval().to(DEVICE)


@pytest.fixture(params=[gpt_oss, gemma2])
def build(request, tiny_config):
    return partial(request.param, tiny_config)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("center_keys", [True, False])
def test_sinks_and_softcap(build, padding, center_keys):
    prompt, chunks = tokens(2, 30), [tokens(2, n) for n in (1, 4, 1, 12)]
    mask = torch.ones(2, 60, dtype=torch.int64, device=DEVICE)
    mask[0, :padding] = 0
    options = {"mask": mask if padding else None, "center_keys": center_keys}
    assert_same_logits(build("eager"), build("turboquant"), prompt, chunks, **options)


def test_sinks_and_softcap_stay_on_codes(build, no_dequantizing):
    step_logits(build("turboquant"), tokens(2, 30), [tokens(2, n) for n in (1, 4, 1)])


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"s_aux": torch.zeros(4, device=DEVICE)}, {}], ids=str)
def test_dense_attention_keeps_to_the_type_of_its_keys(tiny_model, options):
    query, keys, values = (torch.randn(1, heads, 20, 64, device=DEVICE).bfloat16() for heads in (4, 2, 2))
    module = tiny_model.model.layers[0].self_attn
    found, _ = turboquant_attention(module, query, keys, values, None, **options)
    expected, _ = turboquant_attention(module, query.float(), keys.float(), values.float(), None, **options)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"s_aux": torch.zeros(4, device=DEVICE)}], ids=str)
@pytest.mark.parametrize("sizes", [FullPrecisionSizes(), FullPrecisionSizes(1, 8), FullPrecisionSizes(20, 20)])
@pytest.mark.parametrize("query_len", [1, 3, 12])
def test_a_model_may_take_a_view_of_the_output(tiny_model, sizes, query_len, options):
    # As AFMoE does.
    module = tiny_model.model.layers[0].self_attn
    store = growing_store(TurboQuantConfig(64, 4, 4), 2, 2, torch.float32, DEVICE, sizes)
    keys = torch.randn(2, 2, 10 + query_len, 64, device=DEVICE)
    store.append(keys[:, :, :10], keys[:, :, :10])
    given = Stored(store, store.append_parts(keys[:, :, 10:], keys[:, :, 10:]))
    query = torch.randn(2, 4, query_len, 64, device=DEVICE)
    for states in (hand_over(given, keys.shape, keys.dtype, DEVICE), (keys, keys)):
        output, _ = turboquant_attention(module, query, *states, None, **options)
        assert output.view(2, query_len, -1).shape == (2, query_len, 256)


def test_a_position_bias_with_softcap_is_refused(tiny_model):
    states = torch.randn(1, 2, 5, 64, device=DEVICE)
    module, bias = tiny_model.model.layers[0].self_attn, torch.zeros(1, 2, 5, 5, device=DEVICE)
    with pytest.raises(ValueError, match="softcap or sinks together with a position_bias are not supported"):
        turboquant_attention(module, *[states] * 3, None, softcap=2.0, position_bias=bias)


@pytest.mark.parametrize("asked", ["output_attentions", "head_mask", "sinks"])
def test_what_only_eager_attention_gives_is_refused(tiny_model, asked):
    states = torch.randn(1, 2, 5, 64, device=DEVICE)
    module = tiny_model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=f'attn_implementation="eager" for {asked}'):
        turboquant_attention(module, *[states] * 3, None, **{asked: True})
    turboquant_attention(module, *[states] * 3, None, output_attentions=False, head_mask=None)


def test_weights_are_not_left_out_in_silence(fused_model, prompt):
    with pytest.raises(ValueError, match="forms no weights"):
        fused_model(prompt, output_attentions=True)


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"scaling": 0.3}, {"scaling": None}, {"position_bias": True}])
@pytest.mark.parametrize("query_len", [1, 5, 12])
def test_dropout_scaling_and_a_position_bias_on_stored_tokens(tiny_model, options, query_len):
    torch.manual_seed(0)
    module, query = tiny_model.model.layers[0].self_attn, torch.randn(1, 4, query_len, 64, device=DEVICE)
    sizes = FullPrecisionSizes(1, 8)
    store = growing_store(TurboQuantConfig(64, 8, 8), 1, 2, torch.float32, DEVICE, sizes)
    keys, values = torch.randn(2, 1, 2, 50 + query_len, 64, device=DEVICE)
    store.append(keys[:, :, :50], values[:, :, :50])
    recent = store.append_parts(keys[:, :, 50:], values[:, :, 50:])
    if "position_bias" in options:
        options = {"position_bias": torch.randn(1, 4, query_len, 50 + query_len, device=DEVICE)}
    handed = hand_over(Stored(store, recent), keys.shape, torch.float32, DEVICE)
    mask = torch.ones(query_len, 50 + query_len, dtype=torch.bool, device=DEVICE).tril(50)[None, None]
    # Where everything is dropped, the kernels of SDPA for GPUs divide zero by zero.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = [
            turboquant_attention(module, query, *pair, given, **options)[0]
            for pair, given in (((keys, values), mask), (handed, mask), (handed, None))
        ]
    for output in outputs[1:]:
        assert (output - outputs[0]).norm() <= 0.03 * outputs[0].norm()
