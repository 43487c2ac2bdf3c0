import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_core import KVCacheLayout, MSEQuantizer, TurboQuantConfig
from turboquant_core.testing import gaussian

FIELDS = ("key_codes", "value_codes", "key_scales", "value_scales")

configs = st.builds(
    TurboQuantConfig,
    st.sampled_from([32, 64, 96, 128, 256]),
    key_bits=st.sampled_from([2, 2.5, 3, 3.5, 4, 5, 6, 8]),
    value_bits=st.sampled_from([2, 2.5, 3, 3.5, 4, 5, 6, 8]),
)
layouts = st.builds(KVCacheLayout, configs, st.integers(1, 9), st.sampled_from([1, 8, 16, 33, 64]))


def plane_bytes(layout, field):
    """The bytes of a head's part of a page that a field takes, token by token [block_size, n]."""
    plane = getattr(layout, field)
    starts = plane.offset + plane.slot_stride * np.arange(layout.block_size)
    return starts[:, None] + np.arange(plane.slot_stride)


@pytest.mark.parametrize(
    ("preset", "head_dim", "slot_bytes", "ratio"),
    [
        ("tq4", 128, 132, 3.88),
        ("tq3", 128, 100, 5.12),
        ("tq2", 128, 68, 7.53),
        ("k6v4", 128, 164, 3.12),
        ("k8v4", 128, 196, 2.61),
        ("tq4", 64, 68, 3.76),
        ("tq3", 64, 52, 4.92),
        ("tq2", 64, 36, 7.11),
    ],
)
def test_bytes_of_a_token_and_what_bf16_would_take(preset, head_dim, slot_bytes, ratio):
    layout = KVCacheLayout(TurboQuantConfig.preset(preset, head_dim), 8, 16)
    assert layout.slot_bytes == slot_bytes
    assert round(2 * 2 * head_dim / layout.slot_bytes, 2) == ratio
    assert layout.head_bytes == 16 * slot_bytes
    assert layout.page_bytes == 8 * 16 * slot_bytes


def test_planes_of_a_known_page():
    layout = KVCacheLayout(TurboQuantConfig.preset("k6v4", 128), 2, 16)
    planes = {field: dataclasses.astuple(getattr(layout, field)) for field in FIELDS}
    assert planes == {
        "key_codes": (0, 96),
        "value_codes": (1536, 64),
        "key_scales": (2560, 2),
        "value_scales": (2592, 2),
    }
    assert layout.head_bytes == 2624


@given(layout=layouts)
def test_planes_follow_each_other_and_cover_a_head_exactly_once(layout):
    claimed = np.concatenate([plane_bytes(layout, field).ravel() for field in FIELDS])
    np.testing.assert_array_equal(claimed, np.arange(layout.head_bytes))
    assert layout.key_scales.offset % 2 == layout.value_scales.offset % 2 == 0


@given(layout=layouts)
def test_views_show_the_bytes_of_their_planes(layout):
    pages = layout.allocate(2)
    assert pages.shape == (2, layout.num_kv_heads, layout.head_bytes)
    assert not pages.any()
    pages.random_(generator=torch.Generator().manual_seed(1))
    raw = pages.numpy()
    views = layout.views(pages)
    for field in FIELDS:
        view = getattr(views, field)
        scales = field.endswith("scales")
        assert view.dtype == (torch.float16 if scales else torch.uint8)
        expected = raw[:, :, plane_bytes(layout, field)]
        np.testing.assert_array_equal(view.contiguous().view(torch.uint8).numpy(), expected)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "config",
    [
        TurboQuantConfig(128),
        TurboQuantConfig(64, 3, 2),
        TurboQuantConfig(96, 2.5, 6),
        TurboQuantConfig(80, 8, 5),
    ],
    ids=["128-4-4", "64-3-2", "96-2.5-6", "80-8-5"],
)
def test_writing_a_slot_touches_exactly_its_bytes(config, field):
    layout = KVCacheLayout(config, num_kv_heads=3, block_size=16)
    pages = layout.allocate(4)
    pages.fill_(0xFF)
    view = getattr(layout.views(pages), field)
    assert view.data_ptr() == pages.data_ptr() + getattr(layout, field).offset
    view[2, 1, 5] = 0
    touched = np.argwhere(pages.numpy() != 0xFF)
    slot = plane_bytes(layout, field)[5]
    np.testing.assert_array_equal(touched, [(2, 1, byte) for byte in slot])


@given(layout=layouts)
def test_writing_all_fields_leaves_no_byte_out(layout):
    pages = layout.allocate(3)
    pages.fill_(0xFF)
    views = layout.views(pages)
    for field in FIELDS:
        getattr(views, field)[:] = 0
    assert not pages.any()


def test_vectors_stored_through_views_come_back():
    layout = KVCacheLayout(TurboQuantConfig(128, 6, 3), num_kv_heads=2, block_size=8)
    views = layout.views(layout.allocate(3))
    keys, values = (gaussian(48, 128, seed).reshape(3, 2, 8, 128) for seed in (1, 2))
    key_q, value_q = MSEQuantizer(128, 6).quantize(keys), MSEQuantizer(128, 3).quantize(values)
    views.key_codes.copy_(key_q.codes)
    views.key_scales.copy_(key_q.scales)
    views.value_codes.copy_(value_q.codes)
    views.value_scales.copy_(value_q.scales)
    assert torch.equal(views.key_codes, key_q.codes)
    assert torch.equal(views.key_scales, key_q.scales)
    assert torch.equal(views.value_codes, value_q.codes)
    assert torch.equal(views.value_scales, value_q.scales)


def test_pages_may_be_every_other_block_of_a_bigger_buffer():
    layout = KVCacheLayout(TurboQuantConfig(64), num_kv_heads=2, block_size=4)
    buffer = layout.allocate(6)
    views = layout.views(buffer[1::2])
    views.key_scales[:] = 1.0
    views.value_codes[:] = 7
    assert not buffer[::2].any()
    assert buffer[1::2].any(-1).all()


def test_fractional_bits_store_two_scales_a_vector():
    layout = KVCacheLayout(TurboQuantConfig(128, 2.5, 4), 2, 16)
    views = layout.views(layout.allocate(5))
    assert views.key_codes.shape == (5, 2, 16, 40)
    assert views.key_scales.shape == (5, 2, 16, 2)
    assert views.value_codes.shape == (5, 2, 16, 64)
    assert views.value_scales.shape == (5, 2, 16, 1)


def test_allocate_takes_a_device():
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    assert layout.allocate(3, "meta").device.type == "meta"
    assert layout.allocate(0).shape == (0, 2, layout.head_bytes)


@pytest.mark.parametrize("num_kv_heads", [0, -1, 2.0, True, "2", None])
def test_a_page_has_a_head(num_kv_heads):
    with pytest.raises(ValueError, match=f"num_kv_heads is {num_kv_heads!r}; it must be an int of at least 1"):
        KVCacheLayout(TurboQuantConfig(64), num_kv_heads, 16)


@pytest.mark.parametrize("block_size", [0, -16, 2.0, True, float("nan")])
def test_a_page_has_a_token(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}; it must be an int of at least 1"):
        KVCacheLayout(TurboQuantConfig(64), 8, block_size)


@pytest.mark.parametrize("num_blocks", [-1, 2.0, True])
def test_a_number_of_blocks_is_a_number(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}; it must be an int of at least 0"):
        KVCacheLayout(TurboQuantConfig(64), 2, 16).allocate(num_blocks)


def test_scales_on_odd_addresses_are_refused():
    config = TurboQuantConfig(40, key_bits=3, value_bits=4)
    with pytest.raises(ValueError, match="block_size is 3; with 3/4 bits at head_dim 40"):
        KVCacheLayout(config, 1, 3)
    layout = KVCacheLayout(config, 1, 4)
    assert layout.views(layout.allocate(1)).key_scales.shape == (1, 1, 4, 1)


@pytest.mark.parametrize(
    "pages",
    [
        torch.zeros(4, 2, 1088, dtype=torch.int8),
        torch.zeros(4, 3, 1088, dtype=torch.uint8),
        torch.zeros(4, 2, 1087, dtype=torch.uint8),
        torch.zeros(2, 1088, dtype=torch.uint8),
        torch.zeros(1, 4, 2, 1088, dtype=torch.uint8),
    ],
    ids=["type", "heads", "bytes", "fewer dimensions", "more dimensions"],
)
def test_pages_of_another_layout_are_refused(pages):
    layout = KVCacheLayout(TurboQuantConfig(64), num_kv_heads=2, block_size=16)
    with pytest.raises(ValueError, match=r"takes torch.uint8 \[num_blocks, 2, 1088\]"):
        layout.views(pages)
