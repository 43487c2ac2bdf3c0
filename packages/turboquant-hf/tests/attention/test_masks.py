import copy

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import create_causal_mask

from turboquant_core import TurboQuantConfig
from turboquant_hf import CompressedDynamicCache, TurboQuantCache
from turboquant_hf.attention import function, masks
from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.attention.function import turboquant_attention
from turboquant_hf.attention.handover import Stored, hand_over
from turboquant_hf.storage.growing.store import growing_store

EXACT = {"key_bits": 8, "value_bits": 8}
# What 8 bits cost here is 0.003 to 0.02 of the logits' norm; a token too many or too few costs 0.1 and more.
NOISE = 0.03
PROMPT = 30


def tokens(*shape, seed=9):
    return torch.randint(1500, shape, generator=torch.Generator().manual_seed(seed))


def sharpened(model):
    """The model with weights so large that attention does not look at all tokens alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def sharp_model(tiny_config):
    return sharpened(LlamaForCausalLM(tiny_config()))


@pytest.fixture(params=["eager", "sdpa", "turboquant"])
def model(request, sharp_model):
    model = copy.deepcopy(sharp_model)
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture
def fused_model(sharp_model):
    model = copy.deepcopy(sharp_model)
    model.set_attn_implementation("turboquant")
    return model


def error(actual, expected):
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def second_call(model, cache, mask, chunk, prompt_mask=None):
    """Logits of a chunk that follows a prompt, with a mask of the caller's own."""
    prompt = tokens(len(chunk), PROMPT)
    positions = torch.arange(PROMPT, PROMPT + chunk.shape[1]).expand(len(chunk), -1)
    with torch.no_grad():
        model(prompt, attention_mask=prompt_mask, past_key_values=cache)
        return model(chunk, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def of_kind(mask, kind):
    return mask if kind == "bool" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def causal(query_len):
    return torch.ones(query_len, PROMPT + query_len, dtype=torch.bool).tril(PROMPT)


def blocks_that_see_each_other(query_len):
    mask = causal(query_len)
    mask[1 : query_len - 2, PROMPT + 1 : PROMPT + query_len - 2] = True
    return mask[None, None]


def all_see_all(query_len):
    return torch.ones_like(causal(query_len))[None, None]


def of_each_head(query_len):
    mask = torch.rand(2, 4, query_len, PROMPT + query_len, generator=torch.Generator().manual_seed(1)) < 0.5
    return mask | torch.eye(query_len, PROMPT + query_len, dtype=torch.bool)


def of_all_queries(query_len):
    mask = all_see_all(query_len)[:, :, :1].clone()
    mask[..., 3:9] = False
    return mask


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("query_len", [6, 16])
@pytest.mark.parametrize("make", [blocks_that_see_each_other, all_see_all, of_each_head, of_all_queries])
@pytest.mark.parametrize("kept", [{}, {"sink_tokens": 3, "recent_tokens": 20}])
def test_a_mask_that_is_not_causal_in_a_later_call(model, make, query_len, kind, kept):
    if model.config._attn_implementation == "eager" and kind == "bool":
        pytest.skip("transformers' eager attention adds masks")
    mask = of_kind(make(query_len), kind)
    chunk = tokens(2, query_len)
    expected = second_call(model, DynamicCache(config=model.config), mask, chunk)
    assert error(second_call(model, TurboQuantCache(model.config, **EXACT, **kept), mask, chunk), expected) < NOISE
    in_order = second_call(model, DynamicCache(config=model.config), None, chunk)
    assert error(in_order, expected) > 5 * NOISE


def test_a_static_cache_too(model):
    mask = torch.nn.functional.pad(blocks_that_see_each_other(16), (0, 64 - PROMPT - 16))
    logits = []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, max_length=64, **EXACT)):
        is_static = isinstance(cache, TurboQuantCache)
        given = of_kind(mask if is_static else blocks_that_see_each_other(16), "float")
        logits.append(second_call(model, cache, given, tokens(2, 16)))
    assert error(logits[1], logits[0]) < NOISE


def test_a_mask_that_transformers_makes(model):
    def block(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx >= PROMPT + 2) & (kv_idx >= PROMPT + 2) & (q_idx < PROMPT + 12) & (kv_idx < PROMPT + 12)

    logits = []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, **EXACT)):
        with torch.no_grad():
            model(tokens(2, PROMPT), past_key_values=cache)
            embeds = torch.empty(2, 16, 0)
            mask = create_causal_mask(model.config, embeds, None, past_key_values=cache, or_mask_function=block)
            logits.append(model(tokens(2, 16), attention_mask=mask, past_key_values=cache).logits)
    assert error(logits[1], logits[0]) < NOISE


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_of_padding_that_is_filled_again(fused_model, mode, dtype):
    prompt, buffer = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=dtype)
    for row, padding in ((0, 10), (1, 5)):
        buffer.fill_(1)[row, :padding] = 0
        cache = TurboQuantCache(fused_model.config)
        with mode():
            fused_model(prompt, attention_mask=buffer, past_key_values=cache)
        first, *others = (layer.store.length.row_starts for layer in cache.layers)
        assert first.tolist() == [padding if row == r else 0 for r in range(2)]
        # What is made of them is made once a step.
        assert all(starts is first for starts in others)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_finished_mask_that_is_written_into(fused_model, mode):
    logits = []
    for cache in (DynamicCache(config=fused_model.config), TurboQuantCache(fused_model.config, **EXACT)):
        with mode():
            fused_model(tokens(2, PROMPT), past_key_values=cache)
            mask = create_causal_mask(fused_model.config, torch.empty(2, 3, 0), None, past_key_values=cache)
            mask[..., 5:25] = False
            logits.append(fused_model(tokens(2, 3), attention_mask=mask, past_key_values=cache).logits)
    assert error(logits[1], logits[0]) < NOISE


@pytest.mark.parametrize("kept", [{}, {"recent_tokens": 0}, {"sink_tokens": 3, "recent_tokens": 26}])
@pytest.mark.parametrize("max_length", [None, 64])
def test_padding_that_a_later_mask_shows(fused_model, max_length, kept):
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :7] = 0
    sizes = (1, 3, 12)
    logits = []
    cache = TurboQuantCache(fused_model.config, max_length=max_length, **EXACT, **kept)
    for held in (DynamicCache(config=fused_model.config), cache):
        with torch.no_grad():
            fused_model(tokens(2, PROMPT), attention_mask=mask, past_key_values=held)
            steps = [fused_model(tokens(2, n), past_key_values=held).logits for n in sizes]
        logits.append(torch.cat(steps, dim=1))
    assert error(logits[1], logits[0]) < NOISE


@pytest.mark.parametrize("sizes", [(30, 1, 3, 12), (1,) * 12], ids=["calls", "tokens"])
@pytest.mark.parametrize("recent_tokens", [0, 8])
def test_padding_among_the_very_first_tokens_that_a_later_mask_shows(fused_model, recent_tokens, sizes):
    mask = torch.ones(2, 3, dtype=torch.int64)
    mask[0, :2] = 0
    logits = []
    cache = TurboQuantCache(fused_model.config, **EXACT, sink_tokens=4, recent_tokens=recent_tokens)
    for held in (DynamicCache(config=fused_model.config), cache):
        with torch.no_grad():
            fused_model(tokens(2, 3), attention_mask=mask, past_key_values=held)
            steps = [fused_model(tokens(2, n, seed=n), past_key_values=held).logits for n in sizes]
        logits.append(torch.cat(steps, dim=1))
    assert error(logits[1], logits[0]) < NOISE


@pytest.mark.parametrize("kept", [{}, {"recent_tokens": 0}])
def test_a_window_that_the_mask_alone_knows(tiny_config, kept):
    model = sharpened(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=20)))
    model.set_attn_implementation("turboquant")
    logits = []
    for is_compressed in (False, True):
        # Without a configuration its layers hold everything.
        cache = DynamicCache()
        if is_compressed:
            CompressedDynamicCache(cache, head_dim=64, bits=8, model_config=model.config, **kept)
        with torch.no_grad():
            model(tokens(2, 60), past_key_values=cache)
            steps = [model(tokens(2, n), past_key_values=cache).logits for n in (1, 3, 12)]
        logits.append(torch.cat(steps, dim=1))
    assert error(logits[1], logits[0]) < NOISE


def stored(num_tokens=50, **options):
    """Stored states, and what they say."""
    torch.manual_seed(0)
    states = growing_store(TurboQuantConfig(64, **options), 1, 2, torch.float32, torch.device("cpu"))
    states.append(*torch.randn(2, 1, 2, num_tokens, 64))
    return states, states.dequantize(torch.float32)


def placeholders(states):
    return hand_over(Stored(states, None), (1, 2, states.num_tokens, 64), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("options", [{}, {"key_bits": 2.5, "value_bits": 2.5}])
@pytest.mark.parametrize("query_len", [1, 5])
def test_no_mask_is_a_causal_one(sharp_model, query_len, options):
    module, query = sharp_model.model.layers[0].self_attn, torch.randn(1, 4, query_len, 64)
    states, dense = stored(**options)
    mask = torch.ones(query_len, 50, dtype=torch.bool).tril(50 - query_len)[None, None]
    expected, _ = turboquant_attention(module, query, *dense, mask)
    handed = placeholders(states)
    # What a window means is in the mask; there is none where it is longer than what is stored.
    with torch.device("meta"):
        actual, _ = turboquant_attention(module, query, *handed, None, sliding_window=8)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("query_len", [1, 2, 5])
def test_no_mask_hides_nothing_where_attention_is_not_causal(sharp_model, query_len):
    module, query = copy.deepcopy(sharp_model.model.layers[0].self_attn), torch.randn(1, 4, query_len, 64)
    module.is_causal = False
    states, dense = stored()
    expected, _ = turboquant_attention(module, query, *dense, None)
    actual, _ = turboquant_attention(module, query, *placeholders(states), None)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"s_aux": torch.zeros(4)}], ids=["plain", "softcap", "sinks"]
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_len", [5, 12, 50])
def test_a_call_says_what_no_mask_means(sharp_model, query_len, is_causal, options):
    module, query = copy.deepcopy(sharp_model.model.layers[0].self_attn), torch.randn(1, 4, query_len, 64)
    module.is_causal = not is_causal
    states, dense = stored()
    mask = torch.ones(query_len, 50, dtype=torch.bool).tril(50 - query_len if is_causal else 50)[None, None]
    expected, _ = turboquant_attention(module, query, *dense, mask, **options)
    for pair in (dense, placeholders(states)):
        actual, _ = turboquant_attention(module, query, *pair, None, is_causal=is_causal, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_masks_that_no_attention_reads_are_refused(fused_model):
    cache = TurboQuantCache(fused_model.config)
    block_mask = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, 1, PROMPT + 1, device="cpu")
    whole_numbers = torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.int64)
    for mask, kind in ((block_mask, "a BlockMask"), (whole_numbers, "a tensor of torch.int64")):
        with pytest.raises(TypeError, match=f"attention_mask is {kind}; attn_implementation"):
            second_call(fused_model, cache, mask, tokens(1, 1))
        cache.reset()


def test_a_mask_of_another_length_is_refused(fused_model):
    cache = TurboQuantCache(fused_model.config)
    with pytest.raises(ValueError, match=r"and 31 tokens are attended to; the last dimension must be as long$"):
        second_call(fused_model, cache, torch.ones(1, 1, 1, 20, dtype=torch.bool), tokens(1, 1))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("max_length", "num_tokens"), [(None, PROMPT + 4), (64, PROMPT + 4), (None, 3), (64, 3)])
def test_a_mask_of_a_prompt_that_is_not_as_long_is_refused(fused_model, max_length, num_tokens, kind):
    """SDPA refuses it, too; cut to the prompt it would be somebody else's."""
    mask = of_kind(torch.ones(1, 1, PROMPT, num_tokens, dtype=torch.bool), kind)
    cache = TurboQuantCache(fused_model.config, max_length=max_length)
    room = f", or {max_length} as the cache has room for" if max_length else ""
    message = rf"{num_tokens}\], and {PROMPT} tokens are attended to; the last dimension must be as long{room}$"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        fused_model(tokens(1, PROMPT), attention_mask=mask, past_key_values=cache)


def test_a_mask_of_a_prompt_over_all_that_a_static_cache_has_room_for(fused_model):
    mask = blocks_that_see_each_other(PROMPT)[..., PROMPT:]
    logits = []
    for room, cache in (
        (0, DynamicCache(config=fused_model.config)),
        (34, TurboQuantCache(fused_model.config, max_length=64)),
        (34, TurboQuantCache(fused_model.config, max_length=64, skip_layers=[0])),
    ):
        given = torch.nn.functional.pad(mask, (0, room))
        with torch.no_grad():
            logits.append(fused_model(tokens(2, PROMPT), attention_mask=given, past_key_values=cache).logits)
    assert error(logits[1], logits[0]) < 1e-4
    assert error(logits[2], logits[0]) < 1e-4


def test_a_prompt_needs_no_mask_over_all_that_a_static_cache_has_room_for(fused_model, monkeypatch):
    """SDPA has faster kernels without."""
    given = []

    def spy(module, query, key, value, mask, *args, **kwargs):
        given.append((key.shape[2], value.shape[2], mask))
        return dense_attention(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(function, "dense_attention", spy)
    # More tokens than channels.
    prompt, cache = tokens(2, 70), TurboQuantCache(fused_model.config, max_length=128, skip_layers=[0])
    with torch.no_grad():
        logits = fused_model(prompt, past_key_values=cache).logits
        assert error(logits, fused_model(prompt).logits) < 1e-4
    assert given == [(70, 70, None)] * 4


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("start", [0, 7])
def test_a_mask_that_is_something_else_is_nan_in_a_graph(sharp_model, start, hole, monkeypatch):
    """Of a graph the operations alone: compiling one takes long."""
    module, query = sharp_model.model.layers[0].self_attn, torch.randn(1, 4, 5, 64)
    states, _ = stored()
    mask = torch.ones(5, 50, dtype=torch.bool).tril(45)[None, None]
    mask[..., :start] = False
    expected, _ = turboquant_attention(module, query, *placeholders(states), mask)
    mask[..., 20] = not hole
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    rows = masks._rows_of_mask(mask, 45, 0, None)
    assert (rows.starts.tolist(), rows.window, bool(rows.doubt.isnan())) == ([start], None, hole)
    setattr(mask, masks._FACTS, masks._Facts(rows, False, False, None))
    actual, _ = turboquant_attention(module, query, *placeholders(states), mask)
    if hole:
        assert actual.isnan().all()
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
