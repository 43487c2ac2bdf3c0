"""Sliding-window layers: what full-attention layers say whose mask hides all but the window."""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from turboquant_core import TurboQuantConfig
from turboquant_core.quantized import storage_nbytes
from turboquant_hf import TurboQuantCache
from turboquant_hf.layers.build import kept_tokens
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer
from turboquant_hf.scoring import kl_divergence
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.pages import page_layout
from turboquant_hf.storage.tables import FullPrecisionSizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A GPU rounds keys of another batch otherwise, and codes of two bits that differ are far apart.
TOLERANCE = 1e-4 if DEVICE.type == "cpu" else 5e-2
KEPT = [(1, 8), (3, 0), (0, 5), (40, 100)]
# A prompt longer than any window here and a block, drafts, a chunk, and enough tokens for blocks to be dropped.
CALLS = (110, 1, 1, 8, 30, 1, 70, 3, 1)


@pytest.fixture(scope="module", params=["turboquant", "sdpa"], ids=["fused", "dequantising"])
def attention(request):
    return request.param


@pytest.fixture(scope="module")
def make_model(attention, tiny_config, sharpened):
    def make(window):
        torch.manual_seed(3)
        config = tiny_config(MistralConfig, sliding_window=window, attn_implementation=attention)
        return sharpened(MistralForCausalLM(config).eval()).to(DEVICE)

    return make


def ids(rows, num_tokens, seed=4):
    return torch.randint(1, 1500, (rows, num_tokens), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def masked_to_the_window(config, preset, **kept):
    """A cache of layers that keep all tokens, of which the mask shows the window."""
    cache = TurboQuantCache(config, preset)
    cache.layers = [TurboQuantLayer(preset, text_config=config, **kept_tokens(**kept)) for _ in cache.layers]
    return cache


def feed(model, cache, tokens, calls, mask=None):
    """Logits of every call but the first."""
    logits, stop = [], cache.get_seq_length()
    for num_new in calls:
        start, stop = stop, stop + num_new
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        with torch.no_grad():
            logits.append(model(tokens[:, start:stop], past_key_values=cache, **options).logits)
    return torch.cat(logits[1:], dim=1)


@pytest.mark.parametrize("window", [4, 40, 100])
@pytest.mark.parametrize(("sinks", "recent"), KEPT)
def test_a_window_says_what_a_mask_over_all_tokens_does(make_model, window, sinks, recent):
    model, tokens = make_model(window), ids(2, sum(CALLS))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    options = {"sink_tokens": sinks, "recent_tokens": recent}
    for given in (None, mask):
        caches = TurboQuantCache(model.config, "tq2", **options), masked_to_the_window(model.config, "tq2", **options)
        torch.testing.assert_close(
            *(feed(model, cache, tokens, CALLS, given) for cache in caches), rtol=TOLERANCE, atol=TOLERANCE
        )
        for layer in caches[0].layers:
            assert type(layer) is TurboQuantSlidingLayer
            assert layer.store.length.num_dropped >= 64
            # A ring is no longer than what a token sees, but for the eight that can be taken back.
            kept = sinks + (min(recent, window) + 8 if recent else 0) + 1
            assert layer.store.full_precision.keys.shape[2] == kept


@pytest.mark.parametrize("preset", ["tq2", "tq2.5"])
def test_tokens_do_not_depend_on_how_they_were_grouped(make_model, attention, preset):
    if attention == "sdpa":
        pytest.skip("tokens of a call see each other as they are")
    model, tokens = make_model(40), ids(2, 150)
    logits = [
        feed(model, TurboQuantCache(model.config, preset), tokens, calls)
        for calls in ((60, *[1] * 90), (60, 8, 50, 1, 31))
    ]
    torch.testing.assert_close(*logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_rows_are_picked_and_taken_back_as_where_all_tokens_are_kept(make_model):
    model, tokens = make_model(40), ids(2, 300)
    logits = []
    kept = {"sink_tokens": 1, "recent_tokens": 8}
    for cache in (TurboQuantCache(model.config, "tq2", **kept), masked_to_the_window(model.config, "tq2", **kept)):
        cache.activate_past_recording()
        given = tokens
        parts = [feed(model, cache, given, (100, 1, 8))]
        for rows in ([1, 0], [1, 1]):
            cache.reorder_cache(torch.tensor(rows))
            given = given[rows]
            # Some are taken back within the ring, and some beyond it and the window.
            for taken in (3, 60):
                cache.crop(-taken)
                parts.append(feed(model, cache, given, (1, 1, 20, 8, 60)))
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_up_to_eight_tokens_are_taken_back_as_if_they_had_never_come(make_model):
    model, tokens = make_model(20), ids(2, 130)
    cropped, fresh = (TurboQuantCache(model.config, "tq2") for _ in range(2))
    for num_junk in (8, 1, 5):
        start = fresh.get_seq_length()
        for cache in (cropped, fresh):
            feed(model, cache, tokens, (100 if not start else 1, 1))
        with torch.no_grad():
            model(ids(2, num_junk, seed=9), past_key_values=cropped)
        cropped.crop(-num_junk)
        # Exactly: both read the same numbers.
        assert torch.equal(*(feed(model, copy.deepcopy(cache), tokens, (1, 1)) for cache in (cropped, fresh)))


def poison_codes(store, first, stop):
    """Let the codes of the positions first to stop - 1 be read as NaN."""
    pages = store.pages
    views = page_layout(pages.config, pages.tensor.shape[1]).views(pages.tensor)
    for position in range(first, stop):
        block, slot = divmod(position - store.length.num_dropped, 64)
        for scales in (views.key_scales, views.value_scales):
            scales[block, :, slot] = torch.nan


@pytest.mark.parametrize("window", [5, 8, 30])
@pytest.mark.parametrize("path", ["attend", "dequantize"])
def test_the_newest_tokens_of_a_window_are_never_read_from_their_codes(window, path):
    sizes = FullPrecisionSizes(1, 8).within(window)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 300, 64, generator=generator).to(DEVICE)
    queries = torch.randn(2, 4, 300, 64, generator=generator).to(DEVICE)
    store = growing_store(TurboQuantConfig(64, 8, 8), 2, 2, torch.float32, DEVICE, sizes, window=window)
    store.append(keys[:, :, :100], values[:, :, :100])
    for token in range(100, 300):
        store.trim()
        store.append(*(x[:, :, token : token + 1] for x in (keys, values)))
        first = token + 1 - window
        poisoned = copy.deepcopy(store)
        poison_codes(poisoned, token + 1 - sizes.recent, token + 1)
        if path == "dequantize":
            read = poisoned.dequantize(torch.float32)
            for states, raw in zip(read, (keys, values), strict=True):
                assert states.shape[2] == window
                assert torch.equal(states[:, :, -8:], raw[:, :, max(first, token - 7) : token + 1])
                torch.testing.assert_close(states, raw[:, :, first : token + 1], rtol=0.05, atol=0.2)
            continue
        output = poisoned.attend(queries[:, :, token : token + 1], scale=0.3)
        exact = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, token : token + 1],
            *(x[:, :, first : token + 1] for x in (keys, values)),
            scale=0.3,
            enable_gqa=True,
        ).transpose(1, 2)
        # A window of no more than the newest tokens has nothing of the noise of codes.
        assert (output - exact).norm() < (TOLERANCE if window <= 8 else 0.04) * exact.norm()


def test_memory_counts_what_a_window_keeps(make_model):
    model = make_model(40)
    cache = TurboQuantCache(model.config, sink_tokens=2, recent_tokens=6)
    codes_only = TurboQuantCache(model.config, sink_tokens=0, recent_tokens=0)
    for each in (cache, codes_only):
        feed(model, each, ids(2, 200), (190, 1, 8, 1))
    report, before = cache.memory_report(), codes_only.memory_report()
    for layer, plain in zip(report.layers, before.layers, strict=True):
        # Rows, heads, keys and values, channels in float32; the ring has room for eight more, and one slot is unread.
        assert layer.kept_nbytes == 2 * 2 * 2 * 64 * 4 * (2 + 6 + 8 + 1)
        assert layer.nbytes == plain.nbytes + layer.kept_nbytes
        assert layer.num_tokens == plain.num_tokens < 2 * (40 + 64)
    assert report.nbytes == cache.nbytes == storage_nbytes(x for layer in cache.layers for x in layer.tensors())


def test_what_a_window_keeps_brings_logits_nearer(attention, tiny_config, sharpened):
    torch.manual_seed(5)
    config = tiny_config(
        Gemma3TextConfig,
        num_hidden_layers=3,
        sliding_window=16,
        layer_types=["sliding_attention"] * 3,
        attn_implementation=attention,
    )
    model = Gemma3ForCausalLM(config).eval().to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data += 4
    tokens = ids(1, 80)
    with torch.no_grad():
        expected = model(tokens).logits[:, 30:].float().log_softmax(-1)
    errors = []
    for kept in ({"sink_tokens": 0, "recent_tokens": 0}, {}):
        cache = TurboQuantCache(config, "tq3", **kept)
        found = feed(model, cache, tokens, (30, *[1] * 50)).float().log_softmax(-1)
        errors.append(float(kl_divergence(expected, found).mean()))
    assert errors[1] < 0.7 * errors[0], errors
