"""What the profile run takes is what prefill takes at most: vLLM leaves no more than that free beside the cache."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_vllm.batch.prefill_rows import PrefillRows
from turboquant_vllm.dense_attention import DenseAttention
from turboquant_vllm.prefill import attention as prefill
from turboquant_vllm.prefill.attention import Prefill
from turboquant_vllm.workspace import take_workspace

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 128
LAYOUT = KVCacheLayout(TurboQuantConfig(HEAD_DIM), NUM_KV_HEADS, block_size=16)
WORKSPACE_TOKENS = 2048


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were made within it and lived at the same time."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}
            for tree in ((args, kwargs), result)
        )
        self._alive = {at: kept for at, kept in self._alive.items() if not kept[0].expired()}
        for at in made.keys() - given.keys() - self._alive.keys():
            self._alive[at] = StorageWeakRef(made[at]), made[at].nbytes()
        self.nbytes = max(self.nbytes, sum(nbytes for _, nbytes in self._alive.values()))
        return result


@pytest.fixture
def kernels_of_a_gpu(monkeypatch):
    """Stand-ins that allocate what kernels do: their outputs."""

    def attention(self, query, *args, out=None, **options):
        out = torch.empty_like(query) if out is None else out
        return out, query.new_empty(query.shape[1::-1], dtype=torch.float32)

    def gather(pages, block_table, ends, layout, *, max_tokens, cu_seqlens, dtype, **options):
        shape = (max_tokens, layout.num_kv_heads, layout.config.head_dim)
        return pages.new_empty(shape, dtype=dtype), pages.new_empty(shape, dtype=dtype), cu_seqlens

    def merge(first, second, out=None):
        return torch.empty_like(first[0]) if out is None else out, torch.empty_like(first[1])

    monkeypatch.setattr(DenseAttention, "__call__", attention)
    monkeypatch.setattr(prefill, "cache_gather", gather)
    monkeypatch.setattr(prefill, "merge", merge)


@pytest.mark.parametrize(
    ("options", "num_stored"),
    [
        ({}, WORKSPACE_TOKENS),
        ({"sinks": True}, WORKSPACE_TOKENS),
        ({"centred": False}, WORKSPACE_TOKENS),
        ({"window": 300}, WORKSPACE_TOKENS),
        ({"shares": True}, WORKSPACE_TOKENS + 2 * 256),
        # Longer than the workspace: a row's window is dequantised whole.
        ({"window": 2900}, 2900 - 1 + 64),
    ],
)
def test_prefill_takes_no_more_than_the_profile_run(kernels_of_a_gpu, options, num_stored):
    num_rows, context_len, query_len = 4, 3000, 64
    num_tokens = num_rows * query_len
    query = torch.empty(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    key = torch.empty(num_tokens, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    rows = PrefillRows(
        num_tokens=num_tokens,
        max_query_len=query_len,
        query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32) * query_len,
        context_lens=torch.full((num_rows,), context_len, dtype=torch.int32),
        context_lens_cpu=[context_len] * num_rows,
        query_lens_cpu=[query_len] * num_rows,
        block_table=torch.zeros(num_rows, 200, dtype=torch.int32),
        workspace_tokens=WORKSPACE_TOKENS,
    )
    window = options.get("window")
    assert window or len(rows.context_parts) > 2
    sinks = torch.empty(NUM_HEADS) if "sinks" in options else None
    transform = KeyTransform(torch.zeros(NUM_KV_HEADS, HEAD_DIM) if options.get("centred", True) else None)
    layer = Prefill(DenseAttention(1.0, window, None, None), LAYOUT, sinks)
    own = None if "shares" in options else (key, key)
    arguments = (query, own, LAYOUT.allocate(1), rows, transform, torch.empty_like(query))
    # What is made once, for all layers, is not counted.
    layer(*arguments)
    with PeakMemory() as taken:
        layer(*arguments)
    with PeakMemory() as reserved:
        take_workspace(query, NUM_KV_HEADS, num_stored)
    assert 0 < taken.nbytes <= reserved.nbytes
    # What most models take, nothing more.
    assert options or taken.nbytes == reserved.nbytes
