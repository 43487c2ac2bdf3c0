"""Left-padded batches: a padded row is to be what it is alone, to the codes and to the tokens that are kept."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from turboquant_core import TurboQuantConfig
from turboquant_hf import TurboQuantCache, TurboQuantLayer
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.static.store import static_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import MAX_STEP_TOKENS, FullPrecisionSizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4 if DEVICE.type == "cpu" else 2e-2
PADDED, PROMPT, CALLS = 6, 24, (1, 1, 5, 12, 1)
LENGTH = PADDED + PROMPT + sum(CALLS)


@pytest.fixture(scope="module")
def model(tiny_model):
    model = copy.deepcopy(tiny_model).to(DEVICE)
    model.set_attn_implementation("turboquant")
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 1500, (3, LENGTH), generator=torch.Generator().manual_seed(4)).to(DEVICE)


def padding_mask(rows=(0, PADDED, PADDED // 2)):
    """0 for so many tokens before each row."""
    return (torch.arange(LENGTH, device=DEVICE) >= torch.tensor(rows, device=DEVICE)[:, None]).long()


def feed(model, cache, ids, mask, start, stop):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
    with torch.no_grad():
        return model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache
        ).logits


def feed_calls(model, cache, ids, mask, start):
    """Logits of the calls after a prompt."""
    logits = []
    for num_new in CALLS:
        logits.append(feed(model, cache, ids, mask, start, start + num_new))
        start += num_new
    return torch.cat(logits, dim=1)


def logits_alone(model, ids, row, padded, **options):
    """Logits [num_tokens, vocab_size] of a row that is a batch of its own, without padding."""
    ids, cache = ids[row : row + 1, padded:], TurboQuantCache(model.config, **options)
    mask = torch.ones_like(ids)
    feed(model, cache, ids, mask, 0, LENGTH - sum(CALLS) - padded)
    return feed_calls(model, cache, ids, mask, LENGTH - sum(CALLS) - padded)[0]


OPTIONS = {
    "tq2": {"preset": "tq2"},
    "codes only": {"preset": "tq2", "sink_tokens": 0, "recent_tokens": 0},
    "sinks": {"preset": "tq2", "sink_tokens": 3, "recent_tokens": 0},
    "sinks and recent tokens": {"preset": "tq2", "sink_tokens": 3, "recent_tokens": 40},
    "fractional bits": {"preset": "tq2.5", "sink_tokens": 2},
}


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_padded_row_is_read_as_it_is_alone(model, ids, options, max_length):
    options = {**options, "max_length": max_length}
    mask = padding_mask()
    cache = TurboQuantCache(model.config, **options)
    feed(model, cache, ids, mask, 0, PADDED + PROMPT)
    logits = feed_calls(model, cache, ids, mask, PADDED + PROMPT)
    for row, padded in enumerate((0, PADDED, PADDED // 2)):
        expected = logits_alone(model, ids, row, padded, **options)
        torch.testing.assert_close(logits[row], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_padded_row_of_windows_is_read_as_it_is_alone(tiny_config, ids, options, max_length):
    # Padding leaves the window at the second token after the prompt, and sinks some tokens later.
    window = PROMPT + 2
    config = tiny_config(MistralConfig, sliding_window=window, attn_implementation="turboquant")
    torch.manual_seed(3)
    model = MistralForCausalLM(config).eval().to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 100
    options = {**options, "max_length": max_length}
    mask, cache = padding_mask(), TurboQuantCache(model.config, **options)
    feed(model, cache, ids, mask, 0, PADDED + PROMPT)
    logits = feed_calls(model, cache, ids, mask, PADDED + PROMPT)
    for row, padded in enumerate((0, PADDED, PADDED // 2)):
        expected = logits_alone(model, ids, row, padded, **options)
        torch.testing.assert_close(logits[row], expected, rtol=TOLERANCE, atol=TOLERANCE)


def save_and_load(cache, model, folder):
    cache.save(folder / "cache.safetensors")
    return TurboQuantCache.load(folder / "cache.safetensors", model.config, device=DEVICE)


def apply(operation):
    def applied(cache, *_):
        operation(cache)
        return cache

    return applied


OPERATIONS = {
    "reorder_cache": (apply(lambda cache: cache.reorder_cache(torch.tensor([1, 2, 1]))), [1, 2, 1]),
    "batch_repeat_interleave": (apply(lambda cache: cache.batch_repeat_interleave(2)), [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (apply(lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))), [2, 1]),
    "crop": (apply(lambda cache: cache.crop(-MAX_STEP_TOKENS)), [0, 1, 2]),
    "offload": (apply(lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers]), [0, 1, 2]),
    "deepcopy": (lambda cache, *_: copy.deepcopy(cache), [0, 1, 2]),
    "pickle": (lambda cache, *_: pickle.loads(pickle.dumps(cache)), [0, 1, 2]),
    "save and load": (save_and_load, [0, 1, 2]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_keep_where_rows_start(model, ids, operation, tmp_path):
    """Sinks of a padded row would be codes of two bits if an operation lost them."""
    change, rows = OPERATIONS[operation]
    options = {"preset": "tq2", "sink_tokens": 3, "recent_tokens": 5}
    mask, stop = padding_mask(), PADDED + PROMPT
    cache = TurboQuantCache(model.config, **options)
    feed(model, cache, ids, mask, 0, stop)
    if operation == "crop":
        feed(model, cache, ids.flip(1), mask, stop, stop + MAX_STEP_TOKENS)
    cache = change(cache, model, tmp_path)
    logits = feed_calls(model, cache, ids[rows], mask[rows], stop)
    for index, row in enumerate(rows):
        expected = logits_alone(model, ids, row, (0, PADDED, PADDED // 2)[row], **options)
        torch.testing.assert_close(logits[index], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layer_that_is_offloaded_before_attention(model, ids, offloaded_cache):
    logits = []
    for kind in (TurboQuantCache, offloaded_cache):
        cache = kind(model.config, "tq2")
        feed(model, cache, ids, padding_mask(), 0, PADDED + PROMPT)
        assert cache.layers[0].store.length.row_starts.tolist() == [0, PADDED, PADDED // 2]
        assert kind is TurboQuantCache or cache.layers[0].store.pages.tensor.device.type == "cpu"
        logits.append(feed(model, cache, ids, padding_mask(), PADDED + PROMPT, PADDED + PROMPT + 1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_answers_of_a_padded_batch(model, ids, max_length, options, assert_says_the_same):
    ids, mask = ids[:, : PADDED + PROMPT], padding_mask()[:, : PADDED + PROMPT]
    cache = TurboQuantCache(model.config, key_bits=8, value_bits=8, max_length=max_length)
    torch.manual_seed(1)
    assert_says_the_same(model, ids, cache, DynamicCache(config=model.config), attention_mask=mask, **options)


@pytest.mark.parametrize("max_length", [None, 64])
def test_rows_without_padding_cost_nothing(model, ids, max_length, monkeypatch):
    cache = TurboQuantCache(model.config, max_length=max_length)
    for layer in cache.layers:
        monkeypatch.setattr(layer, "store_again", lambda *_: pytest.fail("the prompt was stored twice"))
    feed(model, cache, ids, torch.ones_like(ids), 0, PROMPT)
    assert cache.layers[0].store.length.row_starts is None


def test_a_static_cache_takes_another_batch_where_it_is(model, ids):
    cache = TurboQuantCache(model.config, "tq2", max_length=64, sink_tokens=3, recent_tokens=0)
    stop = PADDED + PROMPT
    feed(model, cache, ids, padding_mask(), 0, stop)
    before = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    for rows in ((0, 0, 0), (2, 0, 4)):
        cache.reset()
        mask = padding_mask(rows)
        feed(model, cache, ids, mask, 0, stop)
        fresh = TurboQuantCache(model.config, "tq2", max_length=64, sink_tokens=3, recent_tokens=0)
        feed(model, fresh, ids, mask, 0, stop)
        logits = [feed_calls(model, held, ids, mask, stop) for held in (cache, fresh)]
        torch.testing.assert_close(*logits)
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()] == before


def test_a_compiled_prompt(model, ids):
    """One of a batch that is not the first: Dynamo cannot trace how storage is made."""
    first, second = padding_mask((0, 4, 0)), padding_mask()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = []
    for forward in (model, compiled):
        cache = TurboQuantCache(model.config, "tq2", max_length=64)
        feed(model, cache, ids, first, 0, PADDED + PROMPT)
        cache.reset()
        feed(forward, cache, ids, second, 0, PADDED + PROMPT)
        assert cache.layers[1].store.length.row_starts.tolist() == [0, PADDED, PADDED // 2]
        logits.append(feed(model, cache, ids, second, PADDED + PROMPT, PADDED + PROMPT + 1))
    torch.testing.assert_close(*logits, rtol=TOLERANCE, atol=TOLERANCE)
    torch.compiler.reset()


def test_a_prompt_in_inference_mode_goes_on_outside_of_it(model, ids):
    cache = TurboQuantCache(model.config)
    with torch.inference_mode():
        feed(model, cache, ids, padding_mask(), 0, PADDED + PROMPT)
    assert not any(tensor.is_inference() for layer in cache.layers for tensor in layer.tensors())


def test_a_window_with_padding_that_has_left_it(tiny_config, ids):
    config = tiny_config(MistralConfig, sliding_window=16, attn_implementation="turboquant")
    torch.manual_seed(3)
    model = MistralForCausalLM(config).eval().to(DEVICE)
    ids, padded = ids.repeat(1, 3), 30
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    logits = []
    for batch, given in ((ids, mask), (ids[1:2, padded:], mask[1:2, padded:])):
        cache = TurboQuantCache(config, "tq2")
        stop = batch.shape[1] - 3
        feed(model, cache, batch, given, 0, stop)
        assert cache.get_seq_length() == stop
        logits.append(torch.cat([feed(model, cache, batch, given, stop + i, stop + i + 1) for i in range(3)], dim=1))
    batched, alone = logits
    torch.testing.assert_close(batched[1], alone[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [4, PADDED, 17])
def test_a_prompt_in_chunks_may_begin_with_padding_alone(model, ids, chunk):
    mask, logits = padding_mask(), []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, key_bits=8, value_bits=8)):
        stops = [*range(0, PADDED + PROMPT, chunk), PADDED + PROMPT]
        for start, stop in pairwise(stops):
            feed(model, cache, ids, mask, start, stop)
        logits.append(feed_calls(model, cache, ids, mask, PADDED + PROMPT))
    # Padding beyond the first chunk is not known of.
    assert cache.layers[0].store.length.row_starts.tolist() == [0, min(chunk, PADDED), PADDED // 2]
    expected, actual = logits
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_sinks_of_a_padded_row_that_come_in_several_calls_take_no_part_in_the_mean():
    sinks, generator = 3, torch.Generator().manual_seed(0)
    sizes = FullPrecisionSizes(sinks, 0)
    states = growing_store(TurboQuantConfig(64, 2, 2), 2, 2, torch.float32, DEVICE, sizes)
    keys = torch.randn(2, 2, 20, 64, generator=generator).to(DEVICE)
    starts = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    states.append(keys[:, :, :3], keys[:, :, :3], starts)
    states.append(keys[:, :, 3:], keys[:, :, 3:])
    expected = torch.stack([keys[row, :, start + sinks :].mean(1) for row, start in enumerate(starts.tolist())])
    torch.testing.assert_close(states.pages.codec.key_transform.mean.view(2, 2, 64), expected)


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("num_new", [MAX_STEP_TOKENS, MAX_STEP_TOKENS + 4])
def test_sinks_that_came_after_the_prompt_are_read_as_they_are(num_new, max_length):
    sinks, padded, stops = 4, 10, (12, 15, 15 + num_new)
    sizes = FullPrecisionSizes(sinks, 8)
    arguments = (TurboQuantConfig(64, 2, 2), 2, 2, torch.float32, DEVICE)
    states = growing_store(*arguments, sizes) if max_length is None else static_store(*arguments, max_length, sizes)
    keys, values = torch.randn(2, 2, 2, stops[-1], 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    states.append(
        keys[:, :, : stops[0]], values[:, :, : stops[0]], torch.tensor([0, padded], dtype=torch.int32, device=DEVICE)
    )
    for start, stop in pairwise(stops):
        read = states.extend(keys[:, :, start:stop], values[:, :, start:stop], torch.float32)
    for given, expected in zip(read, (keys, values), strict=True):
        assert torch.equal(given[0, :, :sinks], expected[0, :, :sinks])
        assert torch.equal(given[1, :, padded : padded + sinks], expected[1, :, padded : padded + sinks])
        assert torch.equal(given[:, :, stops[1] : stops[2]], expected[:, :, stops[1] :])


@pytest.mark.parametrize(("num_tokens", "sinks"), [(PADDED + 6, 64), (PADDED + 6, PADDED + 6), (PADDED, 64)])
@pytest.mark.parametrize("preset", ["tq2", "tq2.5"])
def test_a_padded_batch_of_no_more_tokens_than_sinks_is_saved_and_loaded(
    model, ids, preset, num_tokens, sinks, tmp_path
):
    mask, options = padding_mask(), {"preset": preset, "sink_tokens": sinks}
    cache = TurboQuantCache(model.config, **options)
    feed(model, cache, ids, mask, 0, num_tokens)
    loaded = save_and_load(cache, model, tmp_path)
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(*(feed_calls(model, each, ids, mask, num_tokens) for each in (loaded, cache)))


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_crop_into_padding_lets_the_row_begin_with_what_comes(max_length):
    sinks, padded, remaining = 3, 12, 10
    sizes = FullPrecisionSizes(sinks, 0)
    arguments = (TurboQuantConfig(64, 2, 2), 2, 2, torch.float32, DEVICE)
    states = growing_store(*arguments, sizes) if max_length is None else static_store(*arguments, max_length, sizes)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 2, 20, 64, generator=generator).to(DEVICE) for _ in range(2))
    states.append(first, first, torch.tensor([0, padded], dtype=torch.int32, device=DEVICE))
    states.crop(remaining)
    states.append(second, second)
    keys, _ = states.dequantize(torch.float32)
    expected = torch.cat([first[:, :, :remaining], second], dim=2)
    is_raw = (keys[:, :, : remaining + 20] == expected).all(-1).all(1)
    position = torch.arange(remaining + 20, device=DEVICE)
    assert torch.equal(is_raw[0], position < sinks)
    assert torch.equal(is_raw[1], (position >= remaining) & (position < remaining + sinks))


def test_without_the_attention_that_sees_the_mask_the_first_slots_are_sinks(tiny_model, ids):
    model = copy.deepcopy(tiny_model).to(DEVICE)
    mask, logits = padding_mask(), []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, key_bits=8, value_bits=8)):
        feed(model, cache, ids, mask, 0, PADDED + PROMPT)
        logits.append(feed_calls(model, cache, ids, mask, PADDED + PROMPT))
    assert cache.layers[0].store.length.row_starts is None
    expected, actual = logits
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_a_padded_prompt_that_was_offloaded_comes_back_to_be_stored_again(monkeypatch):
    keys, values = torch.randn(2, 2, 2, 12, 64, generator=torch.Generator().manual_seed(1)).unbind()
    layer = TurboQuantLayer(sink_tokens=1, recent_tokens=4)
    layer.update(keys, values)
    moves = []

    def move(store, device):
        starts = store.length.row_starts
        moves.append((device, None if starts is None else starts.tolist()))
        return store

    monkeypatch.setattr(Store, "to", move)
    # There is one device here: the layer is told that it belongs to another.
    layer.device = "cuda"
    layer.store_again(keys, values, torch.tensor([3, 0], dtype=torch.int32))
    assert moves == [("cuda", None), ("cpu", [3, 0])]
