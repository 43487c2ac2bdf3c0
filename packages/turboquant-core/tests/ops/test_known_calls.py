"""Arguments are checked once for each shape of a call, and no call that differs slips through."""

from importlib import import_module

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.ops._dispatch import MAX_KNOWN_CALLS, KnownCalls

update_api = import_module("turboquant_core.ops.cache_update.api")
LAYOUT = KVCacheLayout(TurboQuantConfig(64), num_kv_heads=2, block_size=16)


def update(**changes):
    arguments = {
        "key": torch.ones(3, 2, 64),
        "value": torch.ones(3, 2, 64),
        "pages": LAYOUT.allocate(4),
        "slot_mapping": torch.arange(3),
        **changes,
    }
    cache_update(**arguments, layout=LAYOUT)


def attend(**changes):
    arguments = {
        "query": torch.ones(2, 4, 64),
        "pages": LAYOUT.allocate(4),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 5], dtype=torch.int32),
        **changes,
    }
    return decode_attention(**arguments, layout=LAYOUT)


def test_what_follows_from_a_call_is_found_once():
    known, found = KnownCalls(), []
    for shape in ((2, 3), (2, 3), (3, 2)):
        tensors = (torch.ones(shape), None)
        assert known.look_up("call", tensors, lambda shape=shape: found.append(shape) or shape) == shape
    assert found == [(2, 3), (3, 2)]


def test_what_is_raised_is_raised_every_time():
    known = KnownCalls()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            known.look_up("call", (), lambda: 1 // 0)


def test_what_is_kept_is_bounded():
    known = KnownCalls()
    for call in range(3 * MAX_KNOWN_CALLS):
        assert known.look_up(call, (), lambda call=call: call + 1) == call + 1
        assert len(known._found) <= MAX_KNOWN_CALLS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.ones(3, 2, 64, dtype=torch.bfloat16)}, "value is"),
        ({"value": torch.ones(3, 2, 65)[..., :64].transpose(1, 2).contiguous().transpose(1, 2)}, "value has strides"),
        ({"slot_mapping": torch.arange(3, dtype=torch.int32)}, "slot_mapping is"),
        ({"slot_mapping": torch.arange(4)}, "slot_mapping is"),
        ({"pages": torch.zeros(4 * LAYOUT.page_bytes + 1, dtype=torch.uint8)[1:].view(4, 2, -1)}, "start at byte 1"),
        ({"key_transform": KeyTransform(torch.ones(2, 63))}, "key_mean is"),
        ({"key": torch.ones(3, 2, 64, device="meta"), "value": torch.ones(3, 2, 64, device="meta")}, "devices"),
    ],
)
def test_a_misfit_is_refused_after_calls_that_fit(changes, message):
    for _ in range(2):
        update()
        with pytest.raises(ValueError, match=message):
            update(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": torch.tensor([3, 5])}, "seq_lens is"),
        ({"query": torch.ones(2, 3, 64)}, "heads"),
        ({"query": torch.ones(3, 4, 64)}, "equally many"),
        ({"block_table": None, "pages": LAYOUT.allocate(1)}, "without a block_table"),
        ({"sinks": torch.ones(8)[::2]}, "sinks has strides"),
        ({"out": torch.ones(2, 4, 64, dtype=torch.float16)}, "out is"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"path": "int4"}, "path is 'int4'"),
        ({"max_query_len": 2}, "max_query_len is 2"),
    ],
)
def test_attention_refuses_a_misfit_after_calls_that_fit(changes, message):
    for _ in range(2):
        attend()
        with pytest.raises(ValueError, match=message):
            attend(**changes)


def test_the_next_call_of_a_shape_reads_its_own_data():
    first, second = (attend(query=x) for x in (torch.ones(2, 4, 64), torch.randn(2, 4, 64)))
    assert first.data_ptr() != second.data_ptr()
    pages = LAYOUT.allocate(4)
    update(pages=pages)
    assert pages.any()
    pages.zero_()
    update(pages=pages, slot_mapping=torch.full((3,), -1))
    assert not pages.any()


def test_an_address_of_keys_is_not_taken_for_one_of_pages(monkeypatch):
    """Three addresses of a call: a plan for pages off by four bytes is none for keys off by four."""
    planned = []
    monkeypatch.setattr(update_api, "_plan", lambda key, value, pages, *rest: planned.append(key.data_ptr()))

    def shifted(tensor):
        return torch.empty(tensor.nbytes + 4, dtype=torch.uint8)[4:].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    pages, keys = LAYOUT.allocate(4), torch.ones(3, 2, 64)
    monkeypatch.setattr(update_api, "_launches", KnownCalls())
    update(pages=shifted(pages), key=keys)
    update(pages=pages, key=shifted(keys))
    assert len(planned) == 2
