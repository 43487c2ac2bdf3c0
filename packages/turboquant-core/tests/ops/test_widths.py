"""A width that a cache takes is served by a path, or refused by it by name."""

from types import SimpleNamespace

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig, config
from turboquant_core.key_transform import IDENTITY
from turboquant_core.ops import cache_gather, cache_update, decode_attention
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP
from turboquant_core.ops.decode_attention.fragment import FRAGMENT
from turboquant_core.ops.decode_attention.fragment.lookup import key_lookup, split_key_lookup, value_lookup
from turboquant_core.testing import gaussian
from turboquant_core.vector_format import SPLIT_BITS


@pytest.fixture
def new_width(monkeypatch):
    """Seven bits, which the codec has and no cache yet."""
    monkeypatch.setattr(config, "CACHE_BITS", (*config.CACHE_BITS, 7))
    return 7


def test_gathering_kernels_serve_a_new_width(device, new_width):
    layout = KVCacheLayout(TurboQuantConfig(64, new_width, new_width), 1, 16)
    key, value = gaussian(40, 64, seed=1).to(device).view(2, 20, 1, 64)
    pages, expected_pages = layout.allocate(2, device), layout.allocate(2, device)
    slots = torch.arange(20, device=device)
    cache_update(key, value, expected_pages, slots, layout, path="reference")
    cache_update(key, value, pages, slots, layout, path="triton")
    assert (pages != expected_pages).float().mean() < 0.001
    query = gaussian(2, 64, seed=2).to(device).view(1, 2, 64)
    block_table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([20], dtype=torch.int32, device=device)
    expected = decode_attention(query, pages, block_table, lengths, layout, path="reference")
    for path in ("portable", "fp16", "int8"):
        found = decode_attention(query, pages, block_table, lengths, layout, path=path)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    gathered = [
        cache_gather(pages, block_table, lengths, layout, max_tokens=20, dtype=torch.float32, path=path)[:2]
        for path in ("triton", "reference")
    ]
    torch.testing.assert_close(*gathered)


@pytest.mark.parametrize("name", ["key_bits", "value_bits"])
def test_fragments_name_a_width_that_they_do_not_look_up(new_width, name):
    layout = KVCacheLayout(TurboQuantConfig(64, **{"key_bits": 4, "value_bits": 4, name: new_width}), 1, 16)
    assert FRAGMENT.card_obstacle(layout, (9, 0)) == f"{name} is 7, and it takes 2, 3, 4, 5, 6, 8"


def test_fragments_look_up_what_they_say():
    for bits in FRAGMENT.key_bits:
        assert key_lookup(64, bits).constraints.count("=r") == 2
    for bits in FRAGMENT.value_bits:
        assert value_lookup(64, bits).constraints.count("=r") == 8
    for bits in SPLIT_BITS:
        assert split_key_lookup(64, bits).constraints.count("=r") == 4


@pytest.mark.parametrize("bits", [1, 7])
def test_warpgroups_name_a_width_that_they_do_not_look_up(monkeypatch, bits):
    monkeypatch.setattr(config, "CACHE_BITS", (*config.CACHE_BITS, bits))
    monkeypatch.setattr("turboquant_core.ops._path.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    layout = KVCacheLayout(TurboQuantConfig(64, 4, bits), 1, 16)
    on_card = SimpleNamespace(device=torch.device("cuda"))
    assert (
        WARPGROUP.obstacle(layout, IDENTITY, on_card, on_card, on_card) == f"value_bits is {bits}, and it takes 2, 3, 4"
    )
