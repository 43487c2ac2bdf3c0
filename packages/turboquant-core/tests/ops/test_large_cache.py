"""Pages beyond the 2^31 bytes that a 32-bit offset reaches hold what pages within them do."""

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY
from turboquant_core.ops import cache_gather, cache_update, decode_attention
from turboquant_core.ops._path import find_path
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP
from turboquant_core.ops.decode_attention.paths import PATHS
from turboquant_core.testing import gaussian

LAYOUT = KVCacheLayout(TurboQuantConfig(128, 4, 4), 8, 16)
PAGE_BYTES = LAYOUT.num_kv_heads * LAYOUT.head_bytes
NUM_TOKENS = 2 * LAYOUT.block_size


@pytest.fixture(scope="module")
def large(device):
    """Pages of which only those that are written take memory on a CPU."""
    return LAYOUT.allocate(2**31 // PAGE_BYTES + 4, device)


@pytest.fixture(scope="module")
def vectors(device):
    return [
        gaussian(NUM_TOKENS * 8, 128, seed).view(NUM_TOKENS, 8, 128).to(device, torch.bfloat16) for seed in range(2)
    ]


def filled(pages, first_block, key, value, path):
    slots = first_block * LAYOUT.block_size + torch.arange(NUM_TOKENS, device=pages.device)
    cache_update(key, value, pages, slots, LAYOUT, path=path)
    return pages[first_block : first_block + 2].clone()


@pytest.mark.parametrize("path", ["warpgroup", "triton"])
def test_updates_reach_the_last_page(large, vectors, path):
    if path == "warpgroup" and (reason := WARPGROUP.obstacle(LAYOUT, IDENTITY, *vectors, large)):
        pytest.skip(reason)
    small = LAYOUT.allocate(2, large.device)
    expected = filled(small, 0, *vectors, path)
    first_block = len(large) - 2
    assert first_block * PAGE_BYTES > 2**31
    large[first_block:] = 0
    assert torch.equal(filled(large, first_block, *vectors, path), expected)
    assert expected.any()


@pytest.mark.parametrize("path", ["gather", *(path.name for path in PATHS)])
def test_the_last_page_is_read_as_the_first(large, vectors, path):
    device = large.device
    if path != "gather" and (reason := find_path(path, PATHS).obstacle(LAYOUT, device, large)):
        pytest.skip(reason)
    small = LAYOUT.allocate(2, device)
    large[-2:] = filled(small, 0, *vectors, "triton")
    lens = torch.tensor([NUM_TOKENS - 3], dtype=torch.int32, device=device)
    query = gaussian(8, 128, 3).view(1, 8, 128).to(device)

    def read(pages, first_block):
        table = torch.tensor([[first_block, first_block + 1]], dtype=torch.int32, device=device)
        if path == "gather":
            key, value, _ = cache_gather(pages, table, lens, LAYOUT, max_tokens=NUM_TOKENS - 3, path="triton")
            return torch.cat([key, value])
        return decode_attention(query, pages, table, lens, LAYOUT, path=path)

    expected = read(small, 0)
    assert torch.equal(read(large, len(large) - 2), expected)
    assert expected.any()
