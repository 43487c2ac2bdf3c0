"""With TURBOQUANT_CHECK_VALUES the first entry that does not fit is named, and nothing is written."""

import math

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import _values, cache_gather, cache_update, decode_attention

LAYOUT = KVCacheLayout(TurboQuantConfig(64), num_kv_heads=2, block_size=16)
POISON = 0xA5


@pytest.fixture(autouse=True)
def check_values(monkeypatch):
    """Sets the variable, to 1 at first; it is read again after the test."""

    def set_to(value):
        monkeypatch.setenv("TURBOQUANT_CHECK_VALUES", value)
        _values._asked_for.cache_clear()

    set_to("1")
    yield set_to
    _values._asked_for.cache_clear()


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def pages():
    return LAYOUT.allocate(4).fill_(POISON)


def update(cache, slots, **options):
    x = torch.ones(len(slots), 2, 64)
    cache_update(x, x, cache, torch.tensor(slots), LAYOUT, **options)


def attend(**changes):
    arguments = {
        "query": torch.ones(4, 4, 64),
        "pages": LAYOUT.allocate(4),
        "block_table": int32([[0, 1, -7], [2, 3, 99]]),
        "seq_lens": int32([20, 32]),
        "query_start_loc": int32([0, 3, 4]),
        "max_query_len": 3,
        "seq_starts": int32([0, 40]),
        "seq_ends": int32([0, 90]),
        "sinks": torch.tensor([0.0, -math.inf, 1.0, 2.0]),
        "key_transform": KeyTransform(torch.zeros(2, 64)),
    }
    return decode_attention(**(arguments | changes), layout=LAYOUT)


def gather(**changes):
    arguments = {"block_table": int32([[0, 1], [2, 3]]), "seq_lens": int32([20, 32]), "max_tokens": 60}
    return cache_gather(LAYOUT.allocate(4), layout=LAYOUT, **(arguments | changes))


def test_what_fits_is_computed():
    cache = pages()
    update(cache, [63, -1, -(2**63), 0], key_transform=KeyTransform(torch.zeros(2, 64)))
    assert (cache != POISON).any()
    assert attend().isfinite().all()
    gather(starts=int32([3, 40]), cu_seqlens=int32([0, 17, 17]))


def constant_mean(value):
    """A mean that was written after it was checked."""
    return KeyTransform.of_parts(torch.full((2, 64), value), None, None)


@pytest.mark.parametrize(
    ("slots", "options", "message"),
    [
        ([0, -1, 64], {}, r"slot_mapping\[2\] is 64; 4 blocks of 16 tokens have slots up to 63. Give a negative slot"),
        ([2**62, 1], {}, rf"slot_mapping\[0\] is {2**62}; "),
        (
            [0],
            {"key_transform": constant_mean(math.nan)},
            r"key_mean\[0, 0\] is nan; it must be finite. Take it from",
        ),
        (
            [0],
            {"key_transform": KeyTransform.of_parts(None, torch.zeros(2, 64), None)},
            r"key_scale\[0, 0\] is 0.0; it must be 0.001 to 1000",
        ),
        (
            [0],
            {"key_transform": KeyTransform.of_parts(None, None, torch.full((2, 64), 64))},
            r"key_channel_order\[0, 0\] is 64; it must name every channel",
        ),
    ],
)
def test_what_cannot_be_stored_is_named_before_anything_is(slots, options, message):
    cache = pages()
    with pytest.raises(ValueError, match=message):
        update(cache, slots, **options)
    assert (cache == POISON).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": int32([[0, 1, 0], [2, 4, 0]])}, r"block_table\[1, 1\] is 4; .* blocks 0 to 3. Give"),
        ({"block_table": int32([[-1, 1, 0], [2, 4, 0]])}, r"block_table\[0, 0\] is -1; "),
        (
            {"seq_lens": int32([20, 49])},
            r"seq_lens\[1\] is 49; a row has 0 to 48 tokens in 3 blocks of 16. Give a",
        ),
        ({"seq_lens": int32([-1, 2])}, r"seq_lens\[0\] is -1; "),
        (
            {"block_table": None, "seq_lens": int32([1, 17])},
            r"seq_lens\[1\] is 17; a row has 0 to 16 tokens in 1 b",
        ),
        ({"seq_starts": int32([0, -3])}, r"seq_starts\[1\] is -3; positions begin at 0. Give 0"),
        ({"seq_ends": int32([-1, 3])}, r"seq_ends\[0\] is -1; positions begin at 0. Give 0 for a row of which nothing"),
        ({"query_start_loc": int32([0, 3, 5])}, r"query_start_loc\[2\] is 5; the query has 4 tokens. Give the first"),
        ({"query_start_loc": int32([0, 3, 2])}, r"query_start_loc\[2\] is 2; it is not 0 to max_query_len = 3 after"),
        ({"query_start_loc": int32([0, 0, 4])}, r"query_start_loc\[2\] is 4; it is not 0 to max_query_len = 3 after"),
        ({"sinks": torch.tensor([0.0, math.nan, 0, 0])}, r"sinks\[1\] is nan; .* Give minus infinity for no sink"),
        ({"sinks": torch.tensor([math.inf, 0.0, 0, 0])}, r"sinks\[0\] is inf; "),
        (
            {"key_transform": constant_mean(math.inf)},
            r"key_mean\[0, 0\] is inf; it must be finite",
        ),
    ],
)
def test_what_attention_cannot_read_is_named(changes, message):
    out = torch.full((4, 4, 64), 7.0)
    with pytest.raises(ValueError, match=message):
        attend(**changes, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": int32([[0, 1], [2, 9]])}, r"block_table\[1, 1\] is 9; .* blocks 0 to 3"),
        ({"seq_lens": int32([20, 33])}, r"seq_lens\[1\] is 33; a row has 0 to 32 tokens in 2 blocks of 16"),
        ({"starts": int32([-1, 0])}, r"starts\[0\] is -1; positions begin at 0"),
        ({"cu_seqlens": int32([0, 20, 53])}, r"cu_seqlens\[2\] is 53; .* Give what cumulative_lengths gives, or None"),
        ({"cu_seqlens": int32([4, 20, 52])}, r"cu_seqlens\[0\] is 4; "),
    ],
)
def test_what_cannot_be_gathered_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        gather(**changes)


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_unless_asked_for_nothing_is_looked_at(check_values, value):
    check_values(value)
    update(pages(), [64])
    attend(seq_lens=int32([20, 49]))
    gather(seq_lens=int32([20, 33]))
