"""Sinks and recent tokens in full precision, token by token against plain attention."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from turboquant_core import TurboQuantConfig
from turboquant_hf import TurboQuantCache, TurboQuantLayer
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import FullPrecisionSizes

SINKS, RECENT = 3, 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4 if DEVICE.type == "cpu" else 2e-2
KEPT = [(SINKS, 0), (0, RECENT), (SINKS, RECENT), (40, 0), (0, 100), (40, 100)]


def random_states(num_tokens, batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 2, num_tokens, 64, generator=generator).to(DEVICE) for _ in range(2)]


def new_states(sinks=SINKS, recent=RECENT, batch_size=2, bits=2):
    sizes = FullPrecisionSizes(sinks, recent)
    return growing_store(TurboQuantConfig(64, bits, bits), batch_size, 2, torch.float32, DEVICE, sizes)


def as_seen(token, raw, codes, sinks, recent):
    """Keys or values [batch_size, num_kv_heads, token + 1, head_dim] as a token sees them."""
    seen = codes[:, :, : token + 1].clone()
    seen[:, :, :sinks] = raw[:, :, : token + 1][:, :, :sinks]
    first = max(0, token + 1 - recent)
    seen[:, :, first:] = raw[:, :, first : token + 1]
    return seen


def attention(query, keys, values, *, scale, window=None, softcap=None, sinks=None, start=None):
    """Of one token, [batch_size, num_heads, head_dim], in float64."""
    keys, values = (x.repeat_interleave(query.shape[1] // 2, dim=1).double() for x in (keys, values))
    logits = (query.double()[:, :, None] @ keys.transpose(2, 3))[:, :, 0] * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(keys.shape[2], device=DEVICE)
    hidden = position < (0 if window is None else keys.shape[2] - window)
    hidden = hidden if start is None else hidden | (position < start[:, None, None])
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(1, -1, 1).expand(len(logits), -1, 1)], dim=-1)
    weights = logits.softmax(-1)[..., : keys.shape[2]]
    return (weights[:, :, None] @ values)[:, :, 0]


OPTIONS = {
    "plain": {},
    "window within the recent tokens": {"window": 4},
    "window": {"window": 17},
    "softcap": {"softcap": 1.5},
    "model's sinks": {"sinks": torch.tensor([0.5, 1.0, -1.0, 2.0], device=DEVICE)},
    "left padding": {"start": torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)},
    "padding over all codes": {"start": torch.tensor([0, 21], dtype=torch.int32, device=DEVICE)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("sinks", "recent"), KEPT)
def test_calls_of_any_length_attend_as_one_token_after_another(sinks, recent, options):
    keys, values = random_states(34)
    queries = torch.randn(2, 4, 34, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    states = new_states(sinks, recent)
    plain = new_states(sinks, 0)
    for store in (states, plain):
        store.append(*(x[:, :, :20] for x in (keys, values)))
    plain.append(*(x[:, :, 20:] for x in (keys, values)))
    plain = Store(plain.pages, plain.length)  # what all codes say, written with the same mean
    codes = (keys, values) if plain.pages.codec is None else plain.dequantize(torch.float32)
    start = options.get("start")
    given = {("seq_starts" if name == "start" else name): value for name, value in options.items()}
    first = 20
    for num_new in (1, 8, 1, 4):
        states.append(*(x[:, :, first : first + num_new] for x in (keys, values)))
        output = states.attend(queries[:, :, first : first + num_new], scale=0.3, **given)
        for i in range(num_new):
            token = first + i
            seen = (as_seen(token, x, c, sinks, recent) for x, c in zip((keys, values), codes, strict=True))
            expected = attention(queries[:, :, token], *seen, scale=0.3, **options)
            # A row that starts after this token is padding here, and sees nothing.
            rows = slice(None) if start is None else start <= token
            torch.testing.assert_close(output[rows, i].double(), expected[rows], rtol=TOLERANCE, atol=TOLERANCE)
        first += num_new


@pytest.mark.parametrize(("sinks", "recent"), KEPT)
def test_dequantising_one_token_after_another_gives_the_same(sinks, recent):
    keys, values = random_states(34)
    layer = TurboQuantLayer(key_bits=2, value_bits=2, sink_tokens=sinks, recent_tokens=recent)
    layer.update(keys[:, :, :20], values[:, :, :20])
    plain = copy.deepcopy(layer.store)
    plain.append(keys[:, :, 20:], values[:, :, 20:])
    plain = Store(plain.pages, plain.length)
    codes = (keys, values) if plain.pages.codec is None else plain.dequantize(torch.float32)
    for token in range(20, 34):
        read = layer.update(*(x[:, :, token : token + 1] for x in (keys, values)))
        for states, raw, coded in zip(read, (keys, values), codes, strict=True):
            torch.testing.assert_close(states, as_seen(token, raw, coded, sinks, recent))


@pytest.mark.parametrize("num_new", [1, 5, 8, 9, 30])
def test_a_dequantised_call_reads_its_own_tokens_and_the_window_before_them_as_they_are(num_new):
    keys, values = random_states(20 + num_new)
    layer = TurboQuantLayer(sink_tokens=SINKS, recent_tokens=RECENT)
    layer.update(keys[:, :, :20], values[:, :, :20])
    read = layer.update(keys[:, :, 20:], values[:, :, 20:])
    for states, raw in zip(read, (keys, values), strict=True):
        is_raw = (states == raw).all(-1).all(0).all(0)
        first = 20 - RECENT + 1
        assert is_raw.tolist() == [position < SINKS or position >= first for position in range(20 + num_new)]


@pytest.mark.parametrize("num_new", [3, 12])
@pytest.mark.parametrize("prompt", [1, 4, 20])
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_every_token_of_a_call_reads_parts_of_its_own(sinks, prompt, num_new):
    keys, values = random_states(prompt + num_new)
    states, plain = new_states(sinks), new_states(sinks, 0)
    for store in (states, plain):
        store.append(keys[:, :, :prompt], values[:, :, :prompt])
    recent = states.append_parts(keys[:, :, prompt:], values[:, :, prompt:])
    plain.append(keys[:, :, prompt:], values[:, :, prompt:])
    codes = Store(plain.pages, plain.length).dequantize(torch.float32)
    *read, parts = states.dequantize_parts(torch.float32, recent)
    assert parts.shape == (1, num_new, read[0].shape[2])
    length, num_recent = prompt + num_new, read[0].shape[2] - prompt - num_new
    for i, token in enumerate(range(prompt, length)):
        # Where each position is read: among the codes, or after them as it is.
        at = torch.arange(length, device=DEVICE)
        at = torch.where(parts[0, i, :length], at, at + num_recent)
        assert parts[0, i].sum() == length
        assert parts[0, i, at].all()
        for raw, coded, given in zip((keys, values), codes, read, strict=True):
            expected = as_seen(token, raw, coded, sinks, RECENT)
            torch.testing.assert_close(given[:, :, at[: token + 1]], expected)


@pytest.mark.parametrize("bits", [2, 2.5])
@pytest.mark.parametrize("mask_kind", ["none", "padding", "holes"])
def test_fused_calls_equal_one_token_after_another(tiny_model, bits, mask_kind):
    model = copy.deepcopy(tiny_model).to(DEVICE)
    model.set_attn_implementation("turboquant")
    ids = torch.randint(1, 1500, (2, 60), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mask = torch.ones_like(ids)
    if mask_kind != "none":
        mask[0, slice(0, 7) if mask_kind == "padding" else slice(10, 25)] = 0
    logits = []
    for ends in ([20, 21, 34, 37, 59, 60], range(20, 61)):
        cache = TurboQuantCache(model.config, key_bits=bits, value_bits=bits, sink_tokens=2, recent_tokens=5)
        start, parts = 0, []
        for end in ends:
            options = {} if mask_kind == "none" else {"attention_mask": mask[:, :end]}
            with torch.no_grad():
                parts.append(model(ids[:, start:end], past_key_values=cache, **options).logits)
            start = end
        logits.append(torch.cat(parts[1:], dim=1))
    torch.testing.assert_close(*logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_sinks_take_no_part_in_the_mean():
    keys, values = random_states(20)
    keys[:, :, :SINKS] += 1000.0
    for split in (0, 2, SINKS):
        states = new_states()
        for part in (slice(0, split), slice(split, 20)):
            states.append(keys[:, :, part], values[:, :, part])
        torch.testing.assert_close(states.pages.codec.key_transform.mean.view(2, 2, 64), keys[:, :, SINKS:].mean(2))


@pytest.mark.parametrize("path", ["attend", "dequantize"])
def test_a_crop_of_up_to_eight_tokens_equals_a_cache_that_never_had_them(path):
    keys, values = random_states(60)
    cropped, fresh = new_states(), new_states()
    for states in (cropped, fresh):
        states.append(keys[:, :, :20], values[:, :, :20])
    for length in (21, 25, 26, 40):
        before = cropped.num_tokens
        junk = random_states(length - before + 8, seed=length)
        for name, new in zip(("keys", "values"), (keys, values), strict=True):
            junk[name == "values"][:, :, : length - before] = new[:, :, before:length]
        cropped.append(*junk)
        cropped.crop(length)
        fresh.append(keys[:, :, before:length], values[:, :, before:length])
        more = [x[:, :, length : length + 1] for x in (keys, values)]
        twins = copy.deepcopy(cropped), copy.deepcopy(fresh)
        for twin in twins:
            twin.append(*more)
        if path == "attend":
            query = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
            results = [twin.attend(query, scale=None) for twin in twins]
        else:
            results = [torch.stack(twin.dequantize(torch.float32)) for twin in twins]
        assert torch.equal(*results)


@pytest.mark.parametrize("taken_back", [[9 + 2], [8, 8], [100], [10 + 14 + RECENT + 1], [1, 30]])
def test_what_has_left_the_window_stays_codes_when_more_is_taken_back(taken_back):
    keys, values = random_states(101)
    states = new_states()
    for part in (slice(0, 50), *(slice(n, n + 1) for n in range(50, 100))):
        states.append(keys[:, :, part], values[:, :, part])
    codes = Store(states.pages, states.length).dequantize(torch.float32)
    # What the ring had when it was last written.
    held_from = 100 - RECENT - 8
    for count in taken_back:
        states.crop(max(0, states.num_tokens - count))
    length = states.num_tokens
    assert length == max(0, 100 - sum(taken_back))
    states.append(keys[:, :, 100:], values[:, :, 100:])
    if length == 0:
        assert torch.equal(states.dequantize(torch.float32)[0], keys[:, :, 100:])
        return
    read = states.dequantize(torch.float32)
    for seen, raw, coded in zip(read, (keys, values), codes, strict=True):
        expected = coded[:, :, :length].clone()
        expected[:, :, :SINKS] = raw[:, :, :SINKS]
        first = max(length + 1 - RECENT, held_from)
        expected[:, :, first:length] = raw[:, :, first:length]
        torch.testing.assert_close(seen, torch.cat([expected, raw[:, :, 100:]], dim=2))


def test_a_crop_into_the_sinks_begins_afresh():
    keys, values = random_states(30)
    cropped, fresh = new_states(), new_states()
    cropped.append(*random_states(40, seed=9))
    cropped.crop(0)
    cropped.append(keys[:, :, :2], values[:, :, :2])
    cropped.append(*random_states(30, seed=8))
    cropped.crop(2)
    fresh.append(keys[:, :, :2], values[:, :, :2])
    for states in (cropped, fresh):
        states.append(keys[:, :, 2:], values[:, :, 2:])
    for a, b in zip(cropped.dequantize(torch.float32), fresh.dequantize(torch.float32), strict=True):
        assert torch.equal(a, b)


def test_memory_counts_what_is_kept(tiny_model, prompt):
    cache = TurboQuantCache(tiny_model.config, sink_tokens=4, recent_tokens=16)
    with torch.no_grad():
        tiny_model(prompt, past_key_values=cache)
    report = cache.memory_report()
    for layer in report.layers:
        # Rows, heads, keys and values, channels in float32; the ring has room for eight more, and one slot is unread.
        assert layer.kept_nbytes == 2 * 2 * 2 * 64 * 4 * (4 + 16 + 8 + 1)
    codes_only = TurboQuantCache(tiny_model.config, sink_tokens=0, recent_tokens=0)
    with torch.no_grad():
        tiny_model(prompt, past_key_values=codes_only)
    assert report.nbytes == cache.nbytes == codes_only.nbytes + sum(layer.kept_nbytes for layer in report.layers)


def test_a_decode_step_takes_the_same_memory_and_moves_nothing():
    states = new_states(recent=32)
    states.append(*random_states(100))
    before = [tensor.data_ptr() for tensor in states.full_precision.tensors()]
    for seed in range(100):
        states.append(*random_states(1, seed=seed))
    assert [tensor.data_ptr() for tensor in states.full_precision.tensors()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_tokens": -1}, "sink_tokens is -1; it must be an int from 0 to 1048576"),
        ({"sink_tokens": 10**12}, "sink_tokens is 1000000000000; it must be an int from 0 to 1048576"),
        ({"recent_tokens": 2**20 + 1}, "recent_tokens is 1048577; it must be an int from 0 to 1048576"),
        ({"sink_tokens": True}, "sink_tokens is True"),
        ({"recent_tokens": 12.5}, "recent_tokens is 12.5; .* 1048576. It is a number of tokens that there is room for"),
        ({"recent_tokens": "all"}, "recent_tokens is 'all'"),
    ],
)
def test_numbers_that_are_none_are_refused(tiny_config, options, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(tiny_config(), **options)


def test_sinks_and_recent_tokens_help_where_the_first_key_is_far_from_the_others(tiny_config):
    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    keys, values = random_states(200, batch_size=1)
    keys[:, :, 0] *= 20
    query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2
    errors = []
    for options in ({"sink_tokens": 0}, {"sink_tokens": 1}, {"sink_tokens": 1, "recent_tokens": 64}):
        cache = TurboQuantCache(model.config, "tq2", **options)
        cache.update(keys[:, :, :199], values[:, :, :199], 0)
        read = cache.update(keys[:, :, 199:], values[:, :, 199:], 0)
        expected, actual = (attention(query[:, :, 0], *kv, scale=0.125) for kv in ((keys, values), read))
        errors.append(float((expected - actual).norm() / expected.norm()))
    assert errors[2] < errors[1] < errors[0] / 2


@pytest.mark.parametrize("sink_tokens", [1, 3])
def test_a_prompt_of_sinks_alone_leaves_nothing_unwritten_to_be_read(tiny_model, sink_tokens):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    tokens = torch.arange(1, 16)[None]
    caches = (
        TurboQuantCache(model.config, key_bits=8, value_bits=8, sink_tokens=sink_tokens),
        DynamicCache(config=model.config),
    )
    with torch.no_grad():
        for start in range(15):
            actual, expected = (model(tokens[:, start : start + 1], past_key_values=cache).logits for cache in caches)
            assert (actual - expected).norm() < 0.03 * expected.norm()


def test_a_call_of_no_tokens_changes_nothing_that_is_read():
    states = new_states()
    states.append(*random_states(40))
    states.append(*random_states(0))
    assert all(map(torch.equal, states.dequantize(torch.float32), states.stored(torch.float32)))
