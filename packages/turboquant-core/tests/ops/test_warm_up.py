import sys

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops import cache_gather, cache_update, decode_attention
from turboquant_core.ops.cache_update.triton import launch as update_launch
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP
from turboquant_core.raw_copies import CopyColumns
from turboquant_core.warm_up import warm_up

LAYOUT = KVCacheLayout(TurboQuantConfig(128, 4, 4), num_kv_heads=2, block_size=16)


def options(device):
    return {"num_heads": 8, "dtype": torch.bfloat16, "device": device, "max_batch": 100, "max_blocks": 40}


def test_rows_that_decode_attention_does_not_take_are_refused():
    with pytest.raises(ValueError, match="max_query_len is 17"):
        warm_up(LAYOUT, **options("cpu"), max_query_len=17)


def centring(device):
    return KeyTransform(torch.zeros(2, 128, device=device))


def test_without_kernels_there_is_nothing_to_compile_and_nothing_fails():
    warm_up(
        LAYOUT, **options("cpu"), max_query_len=2, window=5, softcap=3.0, has_sinks=True, copies=CopyColumns(1, 16),
        key_transform=centring("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("copies", [CopyColumns(1, 16), None])
def test_attention_on_ranges_is_launched_where_there_are_copies(monkeypatch, copies):
    module, launched = sys.modules["turboquant_core.warm_up"], []
    monkeypatch.setattr(module, "_batches", lambda *arguments: [3])

    def attend(*arguments, **options):
        launched.append(options)
        return decode_attention(*arguments, **options)

    monkeypatch.setattr(module, "decode_attention", attend)
    warm_up(LAYOUT, **options("cpu"), copies=copies)
    (call,) = launched
    for name in ("seq_starts", "seq_ends", "return_lse"):
        assert bool(name in call) is (copies is not None)


@pytest.mark.parametrize("kind", ["plain", "centred", "scaled"])
def test_every_update_is_launched_with_a_kernel_that_was_warmed_up(monkeypatch, kind):
    scaled = kind == "scaled"
    transform = KeyTransform(scale=torch.ones(2, 128)) if scaled else centring("cpu") if kind == "centred" else IDENTITY

    def kernel_of(num_tokens):
        plan = update_launch.plan(LAYOUT, torch.bfloat16, num_tokens, torch.device("cpu"), not scaled)
        # Where warpgroups can run, they take all from so many tokens on, but scaled ones.
        constants = frozenset((name, x) for name, x in plan.keywords.items() if name != "tables")
        return num_tokens >= WARPGROUP.least_tokens and not scaled, constants

    launched = []

    def update(key, value, pages, slot_mapping, layout, *, key_transform):
        assert layout is LAYOUT
        assert key_transform is transform
        launched.append(kernel_of(len(key)))

    monkeypatch.setattr(sys.modules["turboquant_core.warm_up"], "cache_update", update)
    warm_up(LAYOUT, **options("cpu"), key_transform=transform)
    assert len(launched) == len(set(launched)), "two of them compile the same"
    assert set(launched) == {kernel_of(num_tokens) for num_tokens in range(1, 300)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles kernels for a GPU")
@pytest.mark.parametrize(("centred", "copies"), [(True, None), (False, None), (True, CopyColumns(1, 16))])
def test_no_batch_compiles_anything_afterwards(monkeypatch, centred, copies):
    from triton import knobs

    transform = centring("cuda") if centred else IDENTITY
    warm_up(LAYOUT, **options("cuda"), max_query_len=4, copies=copies, key_transform=transform)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: compiled.append(event["repr"]))
    pages = torch.zeros(3, 2, LAYOUT.head_bytes, dtype=torch.uint8, device="cuda")
    for num_tokens in (1, 2, 15, 16, 17, 18, 48, 64, 65, 100, 1000):
        vectors = torch.zeros(num_tokens, 2, 128, dtype=torch.bfloat16, device="cuda")
        slots = torch.arange(num_tokens, device="cuda")
        cache_update(vectors, vectors, pages, slots, LAYOUT, key_transform=transform)
    for query_len in range(1, 5):
        for batch in (*range(1, 40), 63, 64, 65, 99, 100):
            lengths = torch.full((batch,), 9, dtype=torch.int32, device="cuda")
            decode_attention(
                torch.zeros(batch * query_len, 8, 128, dtype=torch.bfloat16, device="cuda"),
                pages,
                torch.zeros(batch, 40, dtype=torch.int32, device="cuda"),
                lengths,
                LAYOUT,
                query_start_loc=None
                if query_len == 1
                else torch.arange(batch + 1, dtype=torch.int32, device="cuda") * query_len,
                max_query_len=query_len,
                seq_starts=lengths // 9 if copies else None,
                seq_ends=lengths - 3 if copies else None,
                key_transform=transform,
                return_lse=copies is not None,
            )
    assert not compiled
    # Of bits that no other test has had compiled.
    other = KVCacheLayout(TurboQuantConfig(128, 5, 3 if centred else 2), 2, 32 if copies else 16)
    cache_gather(
        other.allocate(3, "cuda"),
        torch.zeros(1, 1, dtype=torch.int32, device="cuda"),
        torch.ones(1, dtype=torch.int32, device="cuda"),
        other,
        max_tokens=1,
    )
    assert compiled, "the hook counts nothing"
