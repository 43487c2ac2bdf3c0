"""Raw copies in a layer, step by step as vLLM describes them, against exact attention."""

from types import SimpleNamespace

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY
from turboquant_core.ops.decode_attention.reference import stored_row
from turboquant_vllm.impl import TurboQuantImpl
from turboquant_vllm.raw_copies import GroupCopies, copy_columns, num_copies
from turboquant_vllm.settings import Settings

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 64, 16, 40


def engine_config(max_num_seqs=4, drafted=None, parallel=False):
    speculative = None
    if drafted is not None:
        speculative = SimpleNamespace(num_speculative_tokens=drafted, parallel_drafting=parallel)
    layer = SimpleNamespace(kv_cache=torch.empty(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, 1))
    return SimpleNamespace(
        speculative_config=speculative,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
    )


@pytest.mark.parametrize(
    ("drafted", "parallel", "query_len"),
    [(None, False, 1), (3, False, 4), (3, True, 7), (15, False, 16), (16, False, 1)],
)
def test_drafts_that_decode_attention_verifies_have_columns(drafted, parallel, query_len):
    assert copy_columns(engine_config(1, drafted, parallel), Settings()).max_query_len == query_len


@pytest.mark.parametrize(("sinks", "recent", "copies"), [(1, 16, 4 * 17 + 4 * 15), (0, 0, 0), (2, 0, 8), (0, 1, 4 + 4)])
def test_each_layer_has_copies_for_as_many_requests_as_run_at_a_time(sinks, recent, copies):
    assert num_copies(engine_config(), Settings(sink_tokens=sinks, recent_tokens=recent)) == copies


@pytest.mark.parametrize("settings", [{"sink_tokens": -1}, {"recent_tokens": 1.5}, {"sink_tokens": 300}])
def test_tokens_that_cannot_be_kept_are_refused(settings):
    with pytest.raises(ValueError, match=r"_tokens is"):
        Settings.of({"turboquant": settings})


class Layer:
    """A layer of ours, and one row of vLLM's batches."""

    def __init__(self, drafted=None):
        config, settings = engine_config(drafted=drafted), Settings()
        self.layout = KVCacheLayout(TurboQuantConfig(HEAD_DIM, 4, 4), KV_HEADS, BLOCK_SIZE)
        self.pages = self.layout.allocate(NUM_BLOCKS)
        self.cache = self.pages.view(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, -1)
        self.group = GroupCopies(["layer"], config, settings, torch.device("cpu"))
        self.impl = TurboQuantImpl.__new__(TurboQuantImpl)
        vars(self.impl).update(
            num_kv_heads=KV_HEADS, head_size=HEAD_DIM, scale=HEAD_DIM**-0.5, sliding_window=None, softcap=None,
            sinks=None, _float_sinks=None, _shares_with=None, config=self.layout.config, _copies=None,
            _copies_of=self.impl, _num_copies=num_copies(config, settings),
            key_transform=SimpleNamespace(settled=IDENTITY),
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(0)
        self.keys = self.values = torch.empty(0, KV_HEADS, HEAD_DIM)
        self.block_table = 1 + torch.randperm(NUM_BLOCKS - 1, generator=self.generator).int()[None, :8]

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def store(self, count, dropped=0):
        """New keys and values, and how vLLM describes the step."""
        kept = len(self.keys) - dropped
        key, value = self.draw(count, KV_HEADS, HEAD_DIM), self.draw(count, KV_HEADS, HEAD_DIM)
        self.keys, self.values = torch.cat([self.keys[:kept], key]), torch.cat([self.values[:kept], value])
        position = torch.arange(kept, kept + count)
        slots = self.block_table[0, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        self.impl.do_kv_cache_update(None, key, value, self.cache, slots)
        common = SimpleNamespace(
            num_reqs=1,
            seq_lens=torch.tensor([kept + count], dtype=torch.int32),
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
            block_table_tensor=self.block_table,
            num_actual_tokens=count,
            max_query_len=count,
        )
        return key, value, self.group.of_step(common)

    def decode(self, count=1, dropped=0):
        """One step's output, and what attention with the rule's tokens raw gives."""
        key, value, copies = self.store(count, dropped)
        rows = SimpleNamespace(
            query_start_loc=None if count == 1 else copies.query_start_loc, max_query_len=count,
            seq_lens=copies.seq_lens, block_table=self.block_table,
            copies=copies.decoding(1, count, one_each=count == 1),
        )  # fmt: skip
        query = self.draw(count, HEADS, HEAD_DIM)
        out = torch.empty_like(query)
        pages, layout = self.impl._pages(self.cache)
        self.impl._decode(query, (key, value), pages, layout, rows, out)
        length = len(self.keys)
        raw = sorted({0, *range(max(length - count - 15, 0), length)})
        keys, values = (
            x.transpose(0, 1).clone()
            for x in stored_row(self.pages, self.block_table, 0, length, layout, torch.float64)
        )
        keys[raw], values[raw] = self.keys[raw].double(), self.values[raw].double()
        keys, values = (x.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for x in (keys, values))
        logits = query.double().transpose(0, 1) @ keys.transpose(1, 2) * self.impl.scale
        hidden = torch.arange(length) > torch.arange(length - count, length)[:, None]
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return out, (weights @ values).transpose(0, 1).float()

    def prefill(self, count):
        """A chunk, whose output is not looked at."""
        key, value, copies = self.store(count)
        from turboquant_core.ops.raw_copies import copy_update

        raw = self.impl.copies(key.dtype, key.device)
        copy_update((key, value), self.pages, copies, raw, self.layout, reads_new=False)


def test_a_request_that_prefills_and_decodes():
    layer = Layer()
    layer.prefill(50)
    for _ in range(20):
        torch.testing.assert_close(*layer.decode(), rtol=1e-4, atol=1e-5)


def test_drafts_that_are_dropped():
    layer = Layer(drafted=3)
    layer.prefill(40)
    for dropped in (0, 3, 0, 1, 2):
        torch.testing.assert_close(*layer.decode(4, dropped), rtol=1e-4, atol=1e-5)
