import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MoshiConfig,
    StaticCache,
)

from turboquant_core import TurboQuantConfig, rotation
from turboquant_core.mse import codebook_tables
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import StaticSlidingWindowLayer
from turboquant_hf.layers.build import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from turboquant_hf.layers.static import TurboQuantStaticLayer
from turboquant_hf.storage.pages import Pages
from turboquant_hf.storage.static.store import static_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import FullPrecisionSizes

MAX_LENGTH = 70


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(request.param)
    return model


def ids(batch_size=2, num_tokens=24, seed=11):
    return torch.randint(1, 1500, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


def new_cache(model, **options):
    return TurboQuantCache(model.config, max_length=MAX_LENGTH, **options)


def generate(model, prompt, cache, **kwargs):
    kwargs.setdefault("attention_mask", torch.ones_like(prompt))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(prompt, past_key_values=cache, **arguments)


def addresses(cache):
    return [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]


def steps(forward, model, cache, prompt, mask=None, num_steps=4):
    """Logits of a prompt, without compiling, and of each token after it."""
    with torch.no_grad():
        given = None if mask is None else mask[:, : prompt.shape[1]]
        logits = [model(prompt, attention_mask=given, past_key_values=cache).logits[:, -1]]
        for step, token in enumerate(ids(len(prompt), num_steps, seed=12).split(1, dim=1)):
            length = prompt.shape[1] + step
            given = None if mask is None else mask[:, : length + 1]
            position = torch.full((1, 1), length)
            output = forward(token, attention_mask=given, position_ids=position, past_key_values=cache)
            logits.append(output.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize("preset", ["tq4", "tq2.5"])
def test_says_what_the_growing_cache_says(model, preset, options, assert_says_the_same):
    # At fractional bits the tokens of a chunk see each other as they are where storage is static, fused too.
    kept = {"recent_tokens": 0} if preset == "tq2.5" and "prefill_chunk_size" in options else {}
    caches = new_cache(model, preset=preset, **kept), TurboQuantCache(model.config, preset, **kept)
    torch.manual_seed(0)
    assert_says_the_same(model, ids(), *caches, **options)


def test_left_padding(model, assert_says_the_same):
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    assert_says_the_same(model, ids(), new_cache(model), TurboQuantCache(model.config), attention_mask=mask)


@pytest.mark.parametrize("skip_layers", [[], [0], [1], None], ids=["none", "first", "last", "all"])
@pytest.mark.parametrize("num_tokens", [5, 24])
@pytest.mark.parametrize("num_shown", [None, 0, 30])
def test_layers_of_transformers_that_stay(model, skip_layers, num_tokens, num_shown):
    """Queries of a prompt are the first tokens there, of keys that are as many as there is room for."""
    if skip_layers is None:
        cache = StaticCache(model.config, max_cache_len=MAX_LENGTH)
    else:
        cache = new_cache(model, key_bits=8, value_bits=8, skip_layers=skip_layers)
    stops = [num_tokens, num_tokens + 1, num_tokens + 4, num_tokens + 16]
    for start, stop in zip([0, *stops], stops, strict=False):
        # A mask may be longer than what there is so far.
        given = None if num_shown is None else torch.ones(2, max(stop, num_shown), dtype=torch.int64)
        if given is not None:
            given[:, stop:] = 0
        whole, cached = ids(num_tokens=stops[-1]), {"attention_mask": given, "past_key_values": cache}
        with torch.no_grad():
            actual = model(whole[:, start:stop], **cached).logits
            expected = model(whole[:, :stop]).logits[:, start:]
        tolerance = 0.02 if start else 1e-4
        assert ((actual - expected).norm(dim=-1) < tolerance * expected.norm(dim=-1)).all()


def test_the_mask_of_a_prompt_is_no_larger_than_the_prompt(model):
    is_fused = model.config._attn_implementation == "turboquant"
    for options, sizes in (({}, (24, 0) if is_fused else (MAX_LENGTH, 0)), ({"skip_layers": [1]}, (MAX_LENGTH, 0))):
        cache = new_cache(model, **options)
        for _ in range(2):
            assert cache.get_mask_sizes(24, 0) == sizes
            with torch.no_grad():
                model(ids(), past_key_values=cache)
            assert cache.get_mask_sizes(24, 0) == (MAX_LENGTH, 0)
            cache.reset()


def test_everything_stays_where_it_is(model, assert_says_the_same):
    cache = new_cache(model)
    assert cache.is_compileable
    generate(model, ids(), cache)
    before = addresses(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-3)
    cache.reset()
    assert_says_the_same(model, ids(seed=5), cache, TurboQuantCache(model.config))
    assert addresses(cache) == before


def test_reorder_and_crop_equal_a_cache_built_afresh(model):
    cache, fresh = new_cache(model), new_cache(model)
    steps(model, model, cache, ids())
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        model(ids().flip(0), past_key_values=fresh)
        actual, expected = (model(ids(num_tokens=1), past_key_values=c).logits for c in (cache, fresh))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("padding", [0, 5])
def test_one_graph_serves_every_length(model, backend, padding):
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :padding] = 0
    mask = mask if padding else None
    expected = steps(model, model, TurboQuantCache(model.config), ids(), mask)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    # A mask grows by a token each step, and is a size that changes.
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=None if padding else False)
    actual = steps(compiled, model, new_cache(model), ids(), mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 or (padding and graphs == 2)
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Inductor's code for a GPU, in CUDA graphs")
@pytest.mark.parametrize("padding", [0, 5])
def test_generate_compiles_it_on_a_gpu(model, padding, assert_says_the_same):
    model, prompt = copy.deepcopy(model).cuda(), ids().cuda()
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert_says_the_same(model, prompt, new_cache(model), TurboQuantCache(model.config), attention_mask=mask)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()


def test_a_mask_with_holes_is_nan_in_a_fused_graph(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, 10:15] = 0
    torch.compiler.reset()
    logits = steps(torch.compile(model, backend="eager"), model, new_cache(model), ids(), mask, num_steps=1)
    assert logits[1, 0].isnan().all()
    torch.compiler.reset()


@pytest.mark.parametrize("preset", ["tq4", "tq2.5"])
def test_tokens_that_do_not_fit_are_refused_and_break_nothing(model, preset):
    cache = TurboQuantCache(model.config, preset, max_length=64)
    with torch.no_grad():
        model(ids(num_tokens=63), past_key_values=cache)
        expected = model(ids(num_tokens=1), past_key_values=cache).logits
        before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors()]
        for num_new in (1, 12):
            with pytest.raises(IndexError, match=rf"64 tokens and {num_new} more come, .* max_length=64\. .*crop"):
                model(ids(num_tokens=num_new, seed=1), past_key_values=cache)
        assert all(map(torch.equal, before, (tensor for layer in cache.layers for tensor in layer.tensors())))
        cache.crop(-1)
        assert torch.equal(model(ids(num_tokens=1), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("preset", ["tq4", "tq2.5"])
def test_tokens_that_do_not_fit_are_nan_in_a_graph_and_break_nothing(model, preset):
    cache = TurboQuantCache(model.config, preset, max_length=64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        model(ids(num_tokens=63), past_key_values=cache)
        expected = model(ids(num_tokens=1), past_key_values=cache).logits
        assert compiled(ids(num_tokens=1, seed=1), past_key_values=cache).logits.isnan().all()
        before = [layer.store.pages.tensor.clone() for layer in cache.layers]
        with pytest.raises(IndexError, match="holds 65 tokens"):
            model(ids(num_tokens=1, seed=1), past_key_values=cache)
        cache.crop(-2)
        assert torch.equal(model(ids(num_tokens=1), past_key_values=cache).logits, expected)
        assert all(map(torch.equal, before, (layer.store.pages.tensor for layer in cache.layers)))
    torch.compiler.reset()


def test_a_prompt_that_does_not_fit_is_refused(model):
    cache = new_cache(model)
    with pytest.raises(IndexError, match=r"holds 0 tokens and 71 more come, .* max_length=70\. .*larger max_length"):
        model(ids(num_tokens=MAX_LENGTH + 1), past_key_values=cache)
    layer = cache.layers[0]
    states = torch.zeros(2, 2, MAX_LENGTH + 1, 64)
    with pytest.raises(IndexError, match=r"prompt has 71 tokens and the cache was made for max_length=70"):
        layer.update(states, states)


def test_generate_stops_where_storage_ends(model):
    with pytest.raises(IndexError, match="max_length=70"):
        generate(model, ids(), new_cache(model), max_new_tokens=50, disable_compile=True)


def test_warming_up_changes_nothing(tiny_model):
    cache = new_cache(tiny_model)
    generate(tiny_model, ids(), cache)
    before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors()]
    for layer in cache.layers:
        layer.store.warm_up(layer.dtype)
    assert all(map(torch.equal, before, (tensor for layer in cache.layers for tensor in layer.tensors())))
    assert cache.get_seq_length() == 31


@pytest.mark.parametrize("preset", ["tq4", "tq2.5"])
def test_warming_up_makes_what_reading_keeps(tiny_model, preset):
    cache = TurboQuantCache(tiny_model.config, preset, max_length=70)
    steps(tiny_model, tiny_model, cache, ids(), num_steps=1)
    kept = (codebook_tables, rotation._matrix)
    for function in kept:
        function.cache_clear()
    cache.layers[0].store.warm_up(torch.float32)
    made = [function.cache_info().misses for function in kept]
    assert all(made)
    steps(tiny_model, tiny_model, cache, ids(num_tokens=1), num_steps=1)
    assert [function.cache_info().misses for function in kept] == made


def test_memory_is_that_of_max_length(tiny_model):
    cache = new_cache(tiny_model)
    generate(tiny_model, ids(), cache)
    for layer in cache.memory_report().layers:
        assert layer.token_nbytes == 2 * 31 * 2 * 68
        assert layer.kept_nbytes == 2 * 2 * 2 * 64 * 4 * (DEFAULT_SINK_TOKENS + DEFAULT_RECENT_TOKENS + 8 + 1)
        assert layer.reserved_nbytes == 2 * (128 - 31) * 2 * 68


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), "batch_repeat_interleave does not go with max_length"),
        (
            lambda cache: cache.batch_select_indices(torch.tensor([0])),
            "batch_select_indices does not go with max_length",
        ),
        (lambda cache: cache.reorder_cache(torch.tensor([0])), "1 rows of a static cache of 2"),
        (lambda cache: cache.layers[0].offload(), "offloading does not go with max_length"),
    ],
    ids=["repeat", "select", "reorder", "offload"],
)
def test_what_would_move_it_is_refused(tiny_model, operation, message):
    cache = new_cache(tiny_model)
    generate(tiny_model, ids(), cache)
    with pytest.raises(ValueError, match=message):
        operation(cache)


def test_offloading_is_refused(tiny_model):
    with pytest.raises(ValueError, match="offloading does not go with max_length"):
        TurboQuantCache(tiny_model.config, max_length=70, offloading=True)


@pytest.mark.parametrize("num_new", [1, 3, 12])
@pytest.mark.parametrize("kept", [{}, {"sink_tokens": 0, "recent_tokens": 0}])
def test_a_mask_over_the_tokens_there_are_is_refused_by_its_length(tiny_model, num_new, kept):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    cache = new_cache(model, **kept)
    with torch.no_grad():
        model(ids(2, 20), past_key_values=cache)
        mask = torch.ones(2, 1, num_new, 20 + num_new, dtype=torch.bool)
        with pytest.raises(
            ValueError, match=rf"{20 + num_new}\], and {MAX_LENGTH} tokens are attended to; the last dim"
        ):
            model(ids(2, num_new), attention_mask=mask, past_key_values=cache)


def test_windows_take_the_static_layers_of_transformers(assert_says_the_same):
    config = Gemma3TextConfig(
        vocab_size=1500,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="turboquant",
    )
    torch.manual_seed(1)
    model = Gemma3ForCausalLM(config).eval()
    cache = new_cache(model, key_bits=8, value_bits=8)
    assert cache.is_compileable
    assert [type(layer) for layer in cache.layers] == [StaticSlidingWindowLayer, TurboQuantStaticLayer]
    assert_says_the_same(model, ids(), cache, DynamicCache(config=config))


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def windowed(request, tiny_config):
    config = tiny_config(MistralConfig, sliding_window=16, attn_implementation=request.param)
    torch.manual_seed(1)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(("num_tokens", "skip_layers"), [(10, []), (40, []), (40, [0])])
def test_a_model_with_windows_only(windowed, assert_says_the_same, num_tokens, skip_layers):
    cache = new_cache(windowed, key_bits=8, value_bits=8, skip_layers=skip_layers)
    assert cache.is_compileable
    assert all(cache.is_sliding)
    prompt = ids(num_tokens=num_tokens)
    assert_says_the_same(windowed, prompt, cache, DynamicCache(config=windowed.config))
    cache.reset()
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    expected = DynamicCache(config=windowed.config)
    assert_says_the_same(windowed, prompt, cache, expected, attention_mask=mask, prefill_chunk_size=20)


@pytest.mark.parametrize("kept", [{}, {"sink_tokens": 30, "recent_tokens": 30}], ids=["kept", "all of it kept"])
@pytest.mark.parametrize("preset", ["tq4", "tq2.5"])
def test_windows_say_what_those_of_the_growing_cache_say(windowed, preset, kept):
    prompt, kept = ids(num_tokens=40), {"preset": preset, **kept}
    expected = steps(windowed, windowed, TurboQuantCache(windowed.config, **kept), prompt)
    cache = new_cache(windowed, **kept)
    torch.testing.assert_close(steps(windowed, windowed, cache, prompt), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        cache.crop(-20)
        fresh = new_cache(windowed, **kept)
        steps(windowed, windowed, fresh, prompt)
        fresh.crop(-19)
        fresh.crop(-1)
        actual, wanted = (windowed(ids(num_tokens=12, seed=3), past_key_values=c).logits for c in (cache, fresh))
    assert torch.equal(actual, wanted)
    assert cache.get_seq_length() == 36


@pytest.mark.parametrize(("backend", "num_tokens"), [("eager", 10), ("aot_eager", 40)])
def test_one_graph_serves_every_length_of_windows(windowed, backend, num_tokens):
    prompt = ids(num_tokens=num_tokens)
    expected = steps(windowed, windowed, TurboQuantCache(windowed.config), prompt, num_steps=10)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(windowed, backend=backend, fullgraph=True, dynamic=False)
    actual = steps(compiled, windowed, new_cache(windowed), prompt, num_steps=10)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_windows_are_refused_what_would_move_them_or_does_not_fit(windowed, tmp_path):
    cache = new_cache(windowed)
    generate(windowed, ids(), cache)
    with pytest.raises(ValueError, match="batch_repeat_interleave does not go with max_length"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(IndexError, match=r"31 tokens and 40 more come, .* max_length=70"), torch.no_grad():
        windowed(ids(num_tokens=40), past_key_values=cache)
    with pytest.raises(ValueError, match="TurboQuantStaticSlidingLayer"):
        cache.save(tmp_path / "cache.safetensors")


def test_a_window_that_no_mask_knows_of_is_refused():
    with pytest.raises(ValueError, match=r"max_length=70 needs masks .* moshi .*Leave max_length out"):
        TurboQuantCache(MoshiConfig(sliding_window=8), max_length=70)


def test_nothing_is_warmed_up_without_a_gpu(model, monkeypatch):
    monkeypatch.delattr(Store, "warm_up")
    with torch.no_grad():
        model(ids(), past_key_values=new_cache(model))


@pytest.mark.parametrize("attention", ["turboquant", "sdpa"])
@pytest.mark.parametrize("is_compiling", [False, True])
def test_what_is_on_a_gpu_is_warmed_up_by_a_prompt_once(tiny_model, attention, is_compiling, monkeypatch):
    model, warmed_up = copy.deepcopy(tiny_model), []
    model.set_attn_implementation(attention)
    layer = new_cache(model).layers[0]
    monkeypatch.setattr(Store, "warm_up", lambda store, dtype, *, attends: warmed_up.append((store, attends)))
    # There is no GPU here: storage is told that it is on one.
    monkeypatch.setattr(Pages, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    for num_tokens in (10, 1):
        layer.update(*torch.randn(2, 2, 2, num_tokens, 64))
    assert warmed_up == ([] if is_compiling else [(layer.store, attention == "turboquant")])


def test_a_long_call_that_does_not_fit_is_nan_and_breaks_nothing():
    recent, device = 5, torch.device("cpu")
    sizes = FullPrecisionSizes(2, recent)
    states = static_store(TurboQuantConfig(64), 1, 2, torch.float32, device, 40, sizes)
    states.append(*torch.randn(2, 1, 2, 30, 64))
    before = states.stored(torch.float32)
    keys, _ = states.extend(*torch.randn(2, 1, 2, 12, 64), torch.float32)
    assert keys.isnan().all()
    states.crop(30)
    for now, then in zip(states.stored(torch.float32), before, strict=True):
        assert torch.equal(now[:, :, :-recent], then[:, :, :-recent])
