import pytest
import torch

from turboquant_core import MSEQuantizer, TurboQuantConfig
from turboquant_hf.storage import tables
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.pages import (
    BLOCK_SIZE,
    _traced_attend,
    _traced_read,
    attend_pages,
    block_table,
    tokens_first,
    write_pages,
)
from turboquant_hf.storage.static.store import static_store
from turboquant_hf.storage.tables import FullPrecisionSizes


def random_states(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def relative_error(expected, actual):
    return float((expected - actual).square().sum() / expected.square().sum())


def stored_states(keys, values=None, **overrides):
    config = TurboQuantConfig(keys.shape[-1], **{"key_scale": "norm", "value_scale": "norm", **overrides})
    stored = growing_store(config, *keys.shape[:2], keys.dtype, keys.device)
    stored.append(keys, keys if values is None else values)
    return stored


@pytest.mark.parametrize("bits", [3.5, 4])
@pytest.mark.parametrize("kept", [3, 0])
@pytest.mark.parametrize("none", [-1, BLOCK_SIZE, 10**9])
def test_what_has_no_slot_changes_nothing_stored(bits, kept, none):
    keys = random_states(1, 2, BLOCK_SIZE, 64)
    stored = stored_states(keys, key_bits=bits, value_bits=bits)
    before = read_keys(stored)
    new = tokens_first(random_states(1, 2, 5, 64, seed=1))
    # The last slots of the block, and then none.
    slots = torch.tensor([*range(BLOCK_SIZE - kept, BLOCK_SIZE), *[none] * (5 - kept)])
    write_pages(stored.pages.tensor, new, new, slots, stored.pages.codec)
    after = read_keys(stored)
    assert torch.equal(after[:, :, : BLOCK_SIZE - kept], before[:, :, : BLOCK_SIZE - kept])
    expected = new[:kept].permute(1, 0, 2)
    if kept:
        assert relative_error(expected, after[0, :, -kept:]) < 0.1


def read_keys(stored):
    return stored.dequantize(torch.float32)[0]


def new_store(max_length, device, dtype=torch.float32):
    arguments = (TurboQuantConfig(64), 2, 2, dtype, torch.device(device))
    sizes = FullPrecisionSizes(2, 3)
    return growing_store(*arguments, sizes) if max_length is None else static_store(*arguments, max_length, sizes)


@pytest.mark.parametrize("max_length", [None, 64])
def test_everything_is_on_the_device_that_was_asked_for(max_length):
    stored = new_store(max_length, "meta", torch.float16)
    assert {tensor.device.type for tensor in stored.tensors()} == {"meta"}
    assert stored.pages.device.type == "meta"
    assert stored.full_precision.keys.dtype == stored.full_precision.values.dtype == torch.float16


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_move_takes_everything_along_and_leaves_what_was_there(max_length):
    stored = new_store(max_length, "cpu")
    stored.append(*random_states(2, 2, 2, 10, 64), torch.tensor([0, 3], dtype=torch.int32))
    before = [tensor.clone() for tensor in stored.tensors()]
    moved = stored.to("meta")
    assert [tensor.shape for tensor in moved.tensors()] == [tensor.shape for tensor in before]
    assert {tensor.device.type for tensor in moved.tensors()} == {"meta"}
    assert all(map(torch.equal, stored.tensors(), before))


@pytest.mark.parametrize("bits", [4, 2.5])
@pytest.mark.parametrize("sizes", [tables.CODES_ONLY, FullPrecisionSizes(2, 3)])
@pytest.mark.parametrize("max_length", [None, 128])
def test_a_graph_writes_and_reads_what_a_call_does(max_length, sizes, bits, monkeypatch):
    """Of a graph the operations alone."""
    arguments = (TurboQuantConfig(64, bits, bits), 2, 2, torch.float32, torch.device("cpu"))
    read = []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=is_compiling: value)
        stored = growing_store(*arguments, sizes) if max_length is None else static_store(*arguments, max_length, sizes)
        stored.append(*random_states(2, 2, 2, 70, 64))
        states = stored.extend(*random_states(2, 2, 2, 3, 64, seed=1), torch.float32)
        found = [x[:, :, : stored.num_tokens] for x in states]
        if stored.pages.has_kernel:
            found.append(stored.attend(random_states(2, 4, 3, 64, seed=2), scale=None))
        read.append(found)
    assert all(map(torch.equal, *read))


@pytest.mark.parametrize(("max_length", "is_compiling"), [(None, False), (None, True), (64, False)])
def test_layers_share_the_tables_of_a_step(max_length, is_compiling, monkeypatch):
    """Not where the length is on the device, nor in a graph: torch.compile warns of what is remembered."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    shared = max_length is None and not is_compiling
    of_step = [tables.written, tables.seen] if max_length else [tables.written, tables.seen, block_table]
    for table in of_step:
        table.cache_clear()
    for _ in range(2):
        stored = new_store(max_length, "cpu")
        stored.append(*random_states(2, 2, 2, 10, 64))
        stored.attend(random_states(2, 4, 1, 64), scale=None)
    for table in of_step:
        found = table.cache_info()
        assert (found.misses, found.hits) == ((1, 1) if shared else (0, 0))


def test_a_graph_learns_shapes_and_types():
    stored = stored_states(random_states(2, 3, 10, 64))
    query, dtype = random_states(2, 2, 6, 64).flatten(0, 1).half(), torch.bfloat16
    for return_lse in (False, True):
        results = []
        for each in (stored, stored.to("meta")):
            tensor, codec, device = each.pages.tensor, each.pages.codec, each.pages.device
            where = block_table(1, 2, device), torch.full((2,), 10, dtype=torch.int32, device=device)
            result = _traced_attend(query.to(device), tensor, *where, *[None] * 5, return_lse, codec)
            results.append([*_traced_read(tensor, 1, dtype, codec), *result])
        (of_call, of_graph) = ([(x.shape, x.dtype, x.stride()) for x in result] for result in results)
        assert of_graph == of_call


def test_reading_gives_what_the_quantiser_gives():
    keys, values = random_states(2, 3, 10, 64), random_states(2, 3, 10, 64, seed=1)
    stored = stored_states(
        keys, values, key_bits=3, key_scale="unbiased", value_scale="least_squares", center_keys=False
    )
    expected = []
    for states, quantizer in ((keys, MSEQuantizer(64, 3, "unbiased")), (values, MSEQuantizer(64, 4, "least_squares"))):
        expected.append(quantizer.dequantize(quantizer.quantize(states)))
    for read, wanted in zip(stored.dequantize(torch.float32), expected, strict=True):
        torch.testing.assert_close(read, wanted)


@pytest.mark.parametrize("max_length", [None, 64])
def test_rows_of_first_tokens_alone_are_picked(max_length):
    stored, (keys, values) = new_store(max_length, "cpu"), random_states(2, 2, 2, 2, 64)
    stored.append(keys, values)
    picked = stored.select_rows(torch.tensor([1, 0])).stored(torch.float32)
    assert all(map(torch.equal, picked, (keys.flip(0), values.flip(0))))


def test_tokens_take_their_packed_bytes_in_whole_blocks():
    stored = stored_states(random_states(2, 3, 10, 64), key_bits=3, value_bits=3, center_keys=False)
    stored.append(*[random_states(2, 3, 7, 64, seed=1)] * 2)
    token_bytes = 2 * 3 * 2 * (64 * 3 // 8 + 2)
    assert stored.num_tokens == 17
    assert stored.used_nbytes == 17 * token_bytes
    assert stored.nbytes == BLOCK_SIZE * token_bytes


def test_growing_copies_seldom_and_leaves_little_unused():
    stored = stored_states(random_states(1, 1, 1000, 64), center_keys=False)
    token_bytes = stored.config.slot_bytes
    assert stored.nbytes == 1024 * token_bytes
    copies, new = 0, random_states(1, 1, 1, 64, seed=1)
    for _ in range(1000):
        before = stored.pages.tensor
        stored.append(new, new)
        copies += stored.pages.tensor is not before
        assert stored.nbytes <= (stored.num_tokens * 33 / 32 + 2 * BLOCK_SIZE) * token_bytes
    assert 0 < copies < 30


def test_what_was_stored_survives_growth():
    keys = random_states(2, 2, 300, 64)
    at_once, by_token = stored_states(keys[..., :10, :]), stored_states(keys[..., :10, :])
    at_once.append(keys[..., 10:, :], keys[..., 10:, :])
    for i in range(10, 300):
        by_token.append(keys[..., i : i + 1, :], keys[..., i : i + 1, :])
    for a, b in zip(at_once.dequantize(torch.float32), by_token.dequantize(torch.float32), strict=True):
        torch.testing.assert_close(a, b)


def test_the_mean_comes_from_the_first_tokens_and_stays():
    first = random_states(1, 2, 30, 64, offset=50.0)
    second = random_states(1, 2, 5, 64, seed=1, offset=-50.0)
    stored = stored_states(first)
    mean = stored.pages.codec.key_transform.mean.clone()
    before = read_keys(stored)
    stored.append(second, second)
    assert torch.equal(stored.pages.codec.key_transform.mean, mean)
    torch.testing.assert_close(mean, first[0].mean(-2))
    assert torch.equal(read_keys(stored)[..., :30, :], before)


def test_centring_saves_keys_that_share_a_large_offset():
    states = random_states(1, 2, 30, 64, offset=50.0)
    errors = {
        center: relative_error(states, read_keys(stored_states(states, center_keys=center))) for center in (False, True)
    }
    assert errors[True] < errors[False] / 100


def test_centring_is_by_sequence_and_head():
    states = torch.zeros(2, 2, 8, 64)
    for batch in range(2):
        for head in range(2):
            states[batch, head] = 10.0 * (1 + batch + 2 * head)
    assert torch.equal(read_keys(stored_states(states, key_bits=2)), states)


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_outlier_channels_are_chosen_by_sequence_and_head(bits):
    states = random_states(2, 2, 40, 64)
    for batch in range(2):
        for head in range(2):
            states[batch, head, :, 16 * (batch + 2 * head) :][:, :16] *= 20
    stored = stored_states(states, key_bits=bits, value_bits=bits, center_keys=False)
    plain = stored_states(states, key_bits=int(bits), value_bits=int(bits), center_keys=False)
    for read, read_plain in zip(stored.dequantize(torch.float32), plain.dequantize(torch.float32), strict=True):
        assert relative_error(states, read) < relative_error(states, read_plain) / 5
    assert stored.used_nbytes == 2 * 2 * 2 * 40 * (int(64 * bits) // 8 + 4)


def test_crop_keeps_the_first_tokens_and_frees_the_rest():
    stored = stored_states(random_states(1, 2, 640, 64))
    before = read_keys(stored)
    stored.crop(12)
    assert torch.equal(read_keys(stored), before[..., :12, :])
    assert stored.pages.nbytes == BLOCK_SIZE * stored.config.slot_bytes * 2
    stored.crop(0)
    assert stored.num_tokens == 0
    assert stored.nbytes == 0


def test_drafts_around_the_end_of_a_block_do_not_copy_each_time():
    stored = stored_states(random_states(1, 1, 128, 64))
    draft, copies = random_states(1, 1, 4, 64, seed=1), 0
    for _ in range(20):
        before = stored.pages.tensor
        stored.append(draft, draft)
        stored.crop(128)
        copies += stored.pages.tensor is not before
    assert copies == 1


def test_no_tokens_are_no_calibration():
    nothing = torch.zeros(1, 2, 0, 64)
    stored = stored_states(nothing)
    assert stored.pages.codec is None
    stored.append(*[random_states(1, 2, 20, 64)] * 2)
    assert stored.num_tokens == 20


@pytest.mark.parametrize("window", [None, 8])
def test_reading_nothing_is_an_error(window):
    config, device = TurboQuantConfig(64), torch.device("cpu")
    stored = growing_store(config, 1, 2, torch.float32, device, window=window)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no stored states"):
            stored.dequantize(torch.float32)
        stored.append(*torch.zeros(2, 1, 2, 0, 64))


@pytest.mark.parametrize(("return_lse", "shape"), [(False, (0,)), (True, (6, 4))])
def test_attention_gives_the_log_sum_exp_where_it_is_needed(return_lse, shape):
    stored = stored_states(random_states(2, 2, 10, 64))
    device = stored.pages.device
    where = block_table(len(stored.pages.tensor), 2, device), torch.full((2,), 10, dtype=torch.int32, device=device)
    query, options = random_states(2, 3, 4, 64).flatten(0, 1), [None] * 5
    output, lse = attend_pages(query, stored.pages.tensor, *where, *options, return_lse, stored.pages.codec)
    assert output.shape == query.shape
    assert (lse.shape, lse.dtype) == (shape, torch.float32)


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"sinks": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_attention_sees_a_mean_that_moves_logits_unalike(option):
    stored, query = stored_states(random_states(2, 2, 10, 64, offset=1.0)), random_states(2, 4, 1, 64, seed=1)
    keys, values = (states.repeat_interleave(2, dim=1) for states in stored.dequantize(torch.float32))
    logits = query @ keys.transpose(2, 3) / 8
    sink = torch.zeros(2, 4, 1, 1)
    logits = 2 * torch.tanh(logits / 2) if "softcap" in option else torch.cat([logits, sink], dim=-1)
    expected = logits.softmax(-1)[..., :10] @ values
    actual = stored.attend(query, scale=None, **option)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-3, atol=1e-3)


def finite(store, num_tokens):
    """Whether the last of so many tokens, and a store read whole, give numbers."""
    attended = store.attend(random_states(2, 4, 1, 64), scale=None)
    keys, values = store.dequantize(torch.float32)
    assert store.length.num_seen == num_tokens
    return all(bool(x.isfinite().all()) for x in (attended, keys, values))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("max_length", [None, 200])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kept", "num_tokens"), [(0, 9), (1, 9), (20, 30), (20, 70), (64, 70), (65, 70)])
def test_tokens_that_were_no_numbers_are_forgotten_once_they_are_taken_back(bad, max_length, padded, kept, num_tokens):
    store = new_store(max_length, "cpu")
    keys, values = random_states(2, 2, num_tokens, 64), random_states(2, 2, num_tokens, 64, seed=1)
    keys[:, :, kept:], values[:, :, kept:] = bad, bad
    starts = torch.tensor([0, min(kept, 2)], dtype=torch.int32) if padded else None
    if kept:
        store.append(keys[:, :, :kept], values[:, :, :kept], starts)
        store.append(keys[:, :, kept:], values[:, :, kept:])
        store.crop(kept)
        assert store.length.num_seen == kept
    else:
        store.append(keys, values, starts)
        store.clear()
    for count in (1, 2):
        store.append(random_states(2, 2, 1, 64), random_states(2, 2, 1, 64))
        assert finite(store, kept + count)
