import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops import cache_gather, decode_attention, warm_up

LAYOUT = KVCacheLayout(TurboQuantConfig(128, 4, 4), num_kv_heads=2, block_size=16)


def options(device):
    return {"num_heads": 8, "dtype": torch.bfloat16, "device": device, "max_batch": 100, "max_blocks": 40}


def test_rows_that_decode_attention_does_not_take_are_refused():
    with pytest.raises(ValueError, match="max_query_len is 9"):
        warm_up(LAYOUT, **options("cpu"), max_query_len=9)


def test_without_kernels_there_is_nothing_to_compile_and_nothing_fails():
    warm_up(LAYOUT, **options("cpu"), max_query_len=2, window=5, softcap=3.0, has_sinks=True, centred=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles kernels for a GPU")
@pytest.mark.parametrize("centred", [True, False])
def test_no_batch_compiles_anything_afterwards(monkeypatch, centred):
    from triton import knobs

    warm_up(LAYOUT, **options("cuda"), max_query_len=4, centred=centred)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: compiled.append(event["repr"]))
    pages = torch.zeros(3, 2, LAYOUT.head_bytes, dtype=torch.uint8, device="cuda")
    for query_len in range(1, 5):
        for batch in (*range(1, 40), 63, 64, 65, 99, 100):
            decode_attention(
                torch.zeros(batch * query_len, 8, 128, dtype=torch.bfloat16, device="cuda"),
                pages,
                torch.zeros(batch, 40, dtype=torch.int32, device="cuda"),
                torch.full((batch,), 9, dtype=torch.int32, device="cuda"),
                LAYOUT,
                query_start_loc=None
                if query_len == 1
                else torch.arange(batch + 1, dtype=torch.int32, device="cuda") * query_len,
                max_query_len=query_len,
                key_mean=torch.zeros(2, 128, device="cuda") if centred else None,
            )
    assert not compiled
    cache_gather(
        pages,
        torch.zeros(1, 1, dtype=torch.int32, device="cuda"),
        torch.ones(1, dtype=torch.int32, device="cuda"),
        LAYOUT,
        max_tokens=1,
    )
    assert compiled, "the hook counts nothing"
