"""torch.compile calls the operations as they are, whatever it takes to vary."""

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops import cache_gather, cache_update, decode_attention

LAYOUT = KVCacheLayout(TurboQuantConfig(64), num_kv_heads=2, block_size=64)
ROWS = torch.arange(3, dtype=torch.int32)[:, None]


def store_and_read(key, value, query, seq_lens):
    pages = LAYOUT.allocate(3)
    slots = (64 * ROWS + torch.arange(20)).flatten()
    cache_update(key, value, pages, slots, LAYOUT, path="reference")
    gathered = cache_gather(pages, ROWS, seq_lens, LAYOUT, dtype=torch.float32, max_tokens=len(slots), path="reference")
    return gathered[0], decode_attention(2 * query, pages, None, seq_lens, LAYOUT, path="reference") + 1


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_code_calls_the_operations(dynamic):
    torch._dynamo.reset()
    tensors = torch.randn(60, 2, 64), torch.randn(60, 2, 64), torch.randn(3, 4, 64)
    seq_lens = torch.full((3,), 20, dtype=torch.int32)
    found = torch.compile(store_and_read, dynamic=dynamic, backend="eager")(*tensors, seq_lens)
    for one, expected in zip(found, store_and_read(*tensors, seq_lens), strict=True):
        assert torch.equal(one, expected)
