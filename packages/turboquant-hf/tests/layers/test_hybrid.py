"""Models whose layers differ: windows, sinks, linear attention, shared caches, head sizes, images."""

import pytest
import torch
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    ZayaConfig,
    ZayaForCausalLM,
)

from turboquant_hf import TurboQuantCache
from turboquant_hf.layers.cross import CrossAttentionLayer
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.hybrid import TurboQuantHybridLayer, TurboQuantHybridSlidingLayer
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer

EXACT = {"key_bits": 8, "value_bits": 8}
VOCAB = 300
WINDOW = 80
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def gemma3(attention):
    config = Gemma3TextConfig(
        **COMMON,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        attn_implementation=attention,
    )
    return Gemma3ForCausalLM(config)


def gemma4(attention):
    config = Gemma4TextConfig(
        **{**COMMON, "head_dim": 32},
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        attention_k_eq_v=True,
        global_head_dim=64,
        num_global_key_value_heads=1,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_implementation=attention,
    )
    model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:
        # Its logits are not divided by the root of head_dim: trained norms are small.
        layer.self_attn.q_norm.weight.data.fill_(layer.self_attn.head_dim**-0.5)
    return model


def gemma3n(attention):
    config = Gemma3nTextConfig(
        **COMMON,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 3,
        laurel_rank=8,
        activation_sparsity_pattern=None,
        attn_implementation=attention,
    )
    return Gemma3nForCausalLM(config)


def mistral(attention):
    config = MistralConfig(**COMMON, num_hidden_layers=2, sliding_window=WINDOW, attn_implementation=attention)
    return MistralForCausalLM(config)


def gpt_oss(attention):
    config = GptOssConfig(
        **COMMON,
        num_hidden_layers=2,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        # There is no SDPA with sinks.
        attn_implementation="eager" if attention == "sdpa" else attention,
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(1.0)
    return model


def qwen3_next(attention):
    config = Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        attn_implementation=attention,
    )
    return Qwen3NextForCausalLM(config)


def falcon_h1(attention):
    config = FalconH1Config(
        **COMMON,
        num_hidden_layers=2,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        attn_implementation=attention,
    )
    return FalconH1ForCausalLM(config)


def zaya(attention):
    config = ZayaConfig(
        **COMMON,
        num_hidden_layers=2,
        num_experts=2,
        moe_intermediate_size=32,
        router_hidden_size=16,
        sliding_window=WINDOW,
        layer_types=["hybrid", "hybrid_sliding"],
        attn_implementation=attention,
    )
    return ZayaForCausalLM(config)


BUILDERS = {
    "falcon-h1": falcon_h1,
    "gemma3": gemma3,
    "mistral": mistral,
    "gpt-oss": gpt_oss,
    "qwen3-next": qwen3_next,
    "zaya": zaya,
}
KINDS = {
    "falcon-h1": [TurboQuantHybridLayer] * 2,
    "gemma3": [TurboQuantSlidingLayer, TurboQuantSlidingLayer, TurboQuantLayer, TurboQuantSlidingLayer],
    "mistral": [TurboQuantSlidingLayer] * 2,
    "gpt-oss": [TurboQuantSlidingLayer, TurboQuantLayer],
    "zaya": [TurboQuantHybridLayer, TurboQuantHybridSlidingLayer],
}


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def attention(request):
    return request.param


@pytest.fixture(scope="module", params=BUILDERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, attention):
    torch.manual_seed(3)
    return BUILDERS[name](attention).eval()


def ids(batch_size, num_tokens, seed=4):
    return torch.randint(1, VOCAB, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, cache, **kwargs):
    kwargs.setdefault("attention_mask", torch.ones_like(prompt))
    arguments = {"max_new_tokens": 10, "do_sample": False, **kwargs}
    return model.generate(prompt, past_key_values=cache, **arguments)


def step_logits(model, prompt, cache, mask=None):
    """Logits [batch_size, 34, vocab_size] of chunks after a prompt, the same for every cache."""
    logits, length = [], prompt.shape[1]
    positions = None if mask is None else mask.cumsum(-1).sub(1).clamp(min=0)

    def forward(chunk, start):
        end = start + chunk.shape[1]
        given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        return model(chunk, past_key_values=cache, **given).logits

    with torch.no_grad():
        forward(prompt, 0)
        for size in (1, 1, 3, 8, 20, 1):
            logits.append(forward(ids(len(prompt), size, seed=length), length))
            length += size
    return torch.cat(logits, dim=1)


def assert_close(model, prompt, **kwargs):
    expected = step_logits(model, prompt, DynamicCache(config=model.config), **kwargs)
    actual = step_logits(model, prompt, TurboQuantCache(model.config, **EXACT), **kwargs)
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.03
    # Every token's logits depend on what is stored.
    assert errors.min() > 0


@pytest.mark.parametrize("num_tokens", [20, WINDOW - 5, 3 * WINDOW])
def test_logits_of_the_uncompressed_cache(model, num_tokens):
    assert_close(model, ids(2, num_tokens))


def test_left_padding(model):
    prompt, mask = ids(2, 100), torch.ones(2, 134, dtype=torch.int64)
    mask[0, :30] = 0
    prompt[0, :30] = 0
    assert_close(model, prompt, mask=mask)


def test_drafts_that_are_taken_back(model, name, assert_says_the_same):
    if name in ("falcon-h1", "qwen3-next", "zaya"):
        pytest.skip("generate takes no drafts for models with linear attention")
    prompt = ids(1, 10).repeat(1, 16)
    caches = [TurboQuantCache(model.config) for _ in range(2)]
    assert_says_the_same(model, prompt, *caches, tolerance=0.03, found_options={"prompt_lookup_num_tokens": 5})


def test_layers_and_memory(model, name):
    cache = TurboQuantCache(model.config)
    generate(model, ids(1, 6 * WINDOW), cache)
    for index, (layer, measured) in enumerate(zip(cache.layers, cache.memory_report().layers, strict=True)):
        if name in KINDS:
            assert type(layer) is KINDS[name][index]
        if isinstance(layer, TurboQuantSlidingLayer):
            # The window and at most a block more, beside what growing reserves.
            assert WINDOW <= measured.num_tokens < WINDOW + 64
            assert measured.token_nbytes + measured.reserved_nbytes <= (WINDOW + 3 * 64) * 2 * 68
        elif isinstance(layer, TurboQuantLayer):
            assert measured.num_tokens == 6 * WINDOW + 9


def test_without_recording_what_left_the_window_cannot_be_taken_back():
    torch.manual_seed(3)
    model = mistral("sdpa").eval()
    cache = TurboQuantCache(model.config)
    generate(model, ids(1, 2 * WINDOW), cache)
    cache.crop(0)
    with pytest.raises(RuntimeError, match=r"crop\(-100\) leaves 69 tokens, .* activate_past_recording"):
        cache.crop(-100)


@pytest.mark.parametrize("build", [gemma3, falcon_h1])
def test_beams_over_a_window_or_a_state(build, attention, assert_says_the_same):
    torch.manual_seed(3)
    model = build(attention).eval()
    cache = TurboQuantCache(model.config, **EXACT)
    expected = DynamicCache(config=model.config)
    assert_says_the_same(model, ids(2, 2 * WINDOW), cache, expected, tolerance=0.03, num_beams=3)


def forward(model, tokens, cache):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


def offload_and_prefetch(cache):
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()


@pytest.mark.parametrize("build", [falcon_h1, zaya])
@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (offload_and_prefetch, [0, 1]),
    ],
    ids=["reorder", "repeat", "select", "offload"],
)
def test_rows_of_a_state_go_with_those_of_codes(build, attention, operation, rows):
    torch.manual_seed(3)
    model = build(attention).eval()
    prompt, step = ids(2, 2 * WINDOW), ids(len(rows), 3, seed=5)
    cache, fresh = TurboQuantCache(model.config), TurboQuantCache(model.config)
    forward(model, prompt, cache)
    forward(model, prompt[rows], fresh)
    operation(cache)
    assert cache.nbytes == fresh.nbytes
    torch.testing.assert_close(forward(model, step, cache), forward(model, step, fresh), rtol=1e-4, atol=1e-4)


def test_reset_forgets_everything(model):
    cache, fresh = TurboQuantCache(model.config), TurboQuantCache(model.config)
    forward(model, ids(3, 2 * WINDOW, seed=1), cache)
    cache.reset()
    prompt = ids(3, 20)
    for each in (cache, fresh):
        forward(model, prompt, each)
    assert torch.equal(*(forward(model, prompt[:, :3], each) for each in (cache, fresh)))


def test_a_convolution_that_was_recorded_is_taken_back_with_its_codes():
    layers = TurboQuantHybridLayer("tq4"), TurboQuantHybridLayer("tq4")
    cropped, fresh = layers
    states, inputs = torch.randn(2, 2, 2, 23, 64), torch.randn(2, 8, 23)
    for layer, ends in ((cropped, (20, 23)), (fresh, (20,))):
        layer.activate_past_recording()
        for start, end in zip((0, 20), ends, strict=False):
            layer.update(*states[..., start:end, :])
            layer.update_conv_state(inputs[..., start:end], conv_kernel_size=4)
        assert layer.is_croppable
    cropped.crop(-3)
    fresh.crop(0)
    assert cropped.get_seq_length() == 20
    assert torch.equal(cropped.keys, fresh.keys)
    assert torch.equal(cropped.conv_states[0], fresh.conv_states[0])
    assert any(tensor is cropped.conv_states[0] for tensor in cropped.tensors())


def test_a_recurrent_state_is_not_taken_back(attention):
    torch.manual_seed(3)
    model = falcon_h1(attention).eval()
    cache = TurboQuantCache(model.config)
    forward(model, ids(2, 20), cache)
    assert not any(layer.is_croppable for layer in cache.layers)


@pytest.mark.parametrize("build", [gemma3n, gemma4])
def test_layers_that_read_the_cache_of_another(build, attention):
    torch.manual_seed(3)
    model = build(attention).eval()
    prompt = ids(2, 100)
    mask = torch.ones(2, 134, dtype=torch.int64)
    mask[0, :30] = 0
    cache = TurboQuantCache(model.config, **EXACT)
    expected = step_logits(model, prompt, DynamicCache(config=model.config), mask=mask)
    actual = step_logits(model, prompt, cache, mask=mask)
    own = model.config.num_hidden_layers - 2
    assert [type(layer) for layer in cache.layers[:own]] == [TurboQuantSlidingLayer, TurboQuantLayer] * (own // 2)
    assert not any(isinstance(layer, TurboQuantLayer) for layer in cache.layers[own:])
    # These models' random weights magnify a difference; one that read anything else would be far away.
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < errors.median() < 0.05


def test_shared_layers_that_compute_the_last_tokens_alone(attention):
    torch.manual_seed(3)
    model = gemma4(attention).eval()
    for cache in (DynamicCache, TurboQuantCache):
        logits = []
        for keep in (0, 6):
            given = {"past_key_values": cache(config=model.config), "logits_to_keep": keep}
            with torch.no_grad():
                logits.append([model(ids(1, size, seed=size), **given).logits[:, -6:] for size in (2 * WINDOW, 20)])
        torch.testing.assert_close(logits[1], logits[0])


def test_layers_that_attend_to_an_image(attention):
    config = MllamaConfig(
        text_config={
            **{field: value for field, value in COMMON.items() if field != "head_dim"},
            "bos_token_id": 1,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=290,
        attn_implementation=attention,
    )
    torch.manual_seed(3)
    model = MllamaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.5)
    prompt = ids(1, 40).clamp(max=280)
    prompt[0, 0] = 290
    image = {
        "pixel_values": torch.randn(1, 1, 1, 3, 28, 28, generator=torch.Generator().manual_seed(1)),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, 40, 1, 1, dtype=torch.int64),
    }
    cache = TurboQuantCache(config, **EXACT)
    assert [type(layer) for layer in cache.layers] == [TurboQuantLayer, CrossAttentionLayer] * 2
    logits = {}
    for each in (DynamicCache(config=config), cache):
        with torch.no_grad():
            model(prompt, past_key_values=each, **image)
            # Of all tokens: not every version of transformers takes the new ones' alone.
            seen = torch.ones(1, 43, 1, 1, dtype=torch.int64)
            step = model(ids(1, 3), past_key_values=each, cross_attention_mask=seen)
        logits[type(each)] = step.logits
    difference = (logits[TurboQuantCache] - logits[DynamicCache]).norm() / logits[DynamicCache].norm()
    assert 0 < difference < 0.03
    assert cache.layers[1].get_seq_length() == 5
    cache.crop(-3)
    assert (cache.get_seq_length(), cache.layers[1].get_seq_length()) == (40, 5)


def test_images_in_the_prompt(attention, assert_says_the_same):
    config = Qwen2_5_VLConfig(
        text_config={
            **COMMON,
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
        attn_implementation=attention,
    )
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    grid = torch.tensor([[1, 8, 8]])
    image = torch.tensor([[292, *[290] * 16, 293]])
    prompt = torch.cat([ids(1, 6).clamp(max=280), image, ids(1, 9).clamp(max=280)], dim=1)
    kwargs = {
        "pixel_values": torch.randn(64, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": grid,
        "mm_token_type_ids": (prompt == 290).int(),
    }
    cache = TurboQuantCache(model.config, **EXACT)
    assert_says_the_same(model, prompt, cache, DynamicCache(config=config), max_new_tokens=10, **kwargs)
    assert cache.get_seq_length() == prompt.shape[1] + 9
    if attention == "turboquant":
        assert model.model.language_model.config._attn_implementation == "turboquant"
