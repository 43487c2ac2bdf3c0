import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops import cache_gather, cache_update, decode_attention

LAYOUT = KVCacheLayout(TurboQuantConfig(128, value_head_dim=64), 1, 16)


def write(pages, one):
    cache_update(torch.zeros(1, 1, 128), torch.zeros(1, 1, 64), pages, torch.zeros(1, dtype=torch.int64), LAYOUT)


def attend(pages, one):
    decode_attention(torch.zeros(1, 1, 128), pages, one[None], one, LAYOUT)


def gather(pages, one):
    cache_gather(pages, one[None], one, LAYOUT, max_tokens=1)


@pytest.mark.parametrize("operation", [write, attend, gather])
def test_keys_and_values_of_different_sizes_are_refused(operation):
    message = r"keys have 128 channels and values 64; cache operations take one head_dim\. Quantise them by"
    with pytest.raises(ValueError, match=message):
        operation(LAYOUT.allocate(1), torch.ones(1, dtype=torch.int32))


def test_a_layout_has_room_for_both():
    views = LAYOUT.views(LAYOUT.allocate(2))
    assert views.key_codes.shape == (2, 1, 16, 64)
    assert views.value_codes.shape == (2, 1, 16, 32)
    assert LAYOUT.page_bytes == 16 * (64 + 2 + 32 + 2)
