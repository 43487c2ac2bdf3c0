"""What `generate` and its callers do to a cache, on the dequantising and on the fused path.

Two yardsticks: the text of the uncompressed cache, which eight bits give token for token on this model, and at four
bits the text of a cache built afresh, because every operation picks codes and changes none.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_hf import TurboQuantCache

KEPT = {"sink_tokens": 2, "recent_tokens": 5}
EXACT = {"key_bits": 8, "value_bits": 8, **KEPT}
OPTIONS = {"tq4": {}, "tq2.5": {"preset": "tq2.5"}, "tq4, sinks and recent tokens": KEPT}
NEW_TOKENS = 10


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(scope="module")
def assistant(tiny_config):
    torch.manual_seed(7)
    return LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()


def prompts(batch_size, num_tokens=24, seed=11):
    # No token is the padding token 0.
    return torch.randint(1, 1500, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, cache, **kwargs):
    """The new tokens."""
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **kwargs}
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, **arguments)[:, ids.shape[1] :]


def prefill(model, ids, **options):
    cache = TurboQuantCache(model.config, **options)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def greedy(model, cache, first, num_tokens=NEW_TOKENS):
    """Decode [batch_size, num_tokens] after feeding `first` [batch_size, 1]."""
    new = [first]
    with torch.no_grad():
        for _ in range(num_tokens):
            new.append(model(new[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(new[1:], dim=1)


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": ...},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_give_the_text_of_the_uncompressed_cache(model, assistant, strategy):
    kwargs = dict(STRATEGIES[strategy])
    if "assistant_model" in kwargs:
        kwargs["assistant_model"] = assistant
    ids = prompts(1 if {"prompt_lookup_num_tokens", "assistant_model"} & set(kwargs) else 2)
    texts = []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, **EXACT)):
        torch.manual_seed(1)
        texts.append(generate(model, ids, cache, **kwargs))
    assert torch.equal(*texts)


@pytest.mark.parametrize("options", [{}, {"max_length": 64}, {"preset": "tq2.5"}], ids=str)
def test_a_cache_goes_on_outside_of_inference_mode(model, options, tmp_path):
    ids, more = prompts(2), prompts(2, 5, seed=12)

    def run(cache, mode):
        with mode:
            model(ids, past_key_values=cache)
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 0]))
            if not options:
                cache.save(tmp_path / "cache.safetensors")
                cache = TurboQuantCache.load(tmp_path / "cache.safetensors", model.config)
        with torch.no_grad():
            return model(more, past_key_values=cache).logits

    logits = [run(TurboQuantCache(model.config, **options), mode) for mode in (torch.inference_mode(), torch.no_grad())]
    assert torch.equal(*logits)


@pytest.mark.parametrize("strategy", ["prompt lookup", "assisted"])
def test_verifying_drafts_gives_what_decoding_gives_at_four_bits(model, assistant, strategy):
    # Dequantised, recent tokens would see each other as they are.
    kept = {} if model.config._attn_implementation == "turboquant" else {"recent_tokens": 0}
    verify_drafts(model, assistant, strategy, **kept)


def verify_drafts(model, assistant, strategy, **options):
    kwargs = {"assistant_model": assistant} if strategy == "assisted" else STRATEGIES[strategy]
    # A text that repeats itself has its drafts accepted.
    ids = prompts(1, 8).repeat(1, 4)
    expected = generate(model, ids, TurboQuantCache(model.config, **options))
    assert torch.equal(generate(model, ids, TurboQuantCache(model.config, **options), **kwargs), expected)


def test_several_turns(model):
    texts = []
    for cache in (DynamicCache(config=model.config), TurboQuantCache(model.config, **EXACT)):
        ids = prompts(2)
        for turn in range(3):
            ids = torch.cat([ids, generate(model, ids, cache), prompts(2, 5, seed=turn)], dim=1)
        texts.append(ids)
    assert torch.equal(*texts)


def test_left_padded_batches(model):
    ids, mask = prompts(2), torch.ones(2, 30, dtype=torch.int64)
    mask[:, :6] = 0
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.int64), ids], dim=1)
    expected = generate(model, ids, TurboQuantCache(model.config, **EXACT))
    assert torch.equal(generate(model, padded, TurboQuantCache(model.config, **EXACT), attention_mask=mask), expected)


def test_rows_of_different_length(model):
    ids, mask = prompts(2), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    ids[1, :9] = 0
    expected = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    assert torch.equal(generate(model, ids, TurboQuantCache(model.config, **EXACT), attention_mask=mask), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_crop_equals_a_cache_built_afresh(model, options):
    ids, first = prompts(2), prompts(2, 1, seed=2)
    cache = prefill(model, ids, **options)
    # What the window has room for can be taken back.
    expected = greedy(model, cache, first, num_tokens=MAX_QUERY_LEN)
    cache.crop(-MAX_QUERY_LEN)
    assert cache.get_seq_length() == ids.shape[1]
    assert torch.equal(greedy(model, cache, first, num_tokens=MAX_QUERY_LEN), expected)
    assert torch.equal(greedy(model, prefill(model, ids, **options), first, num_tokens=MAX_QUERY_LEN), expected)


def test_reset_equals_a_new_cache(model):
    cache = TurboQuantCache(model.config, **KEPT)
    generate(model, prompts(3, seed=5), cache)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    expected = generate(model, prompts(2), TurboQuantCache(model.config, **KEPT))
    assert torch.equal(generate(model, prompts(2), cache), expected)


BATCH_OPERATIONS = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "batch_select_indices, bool": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        [0, 2],
    ),
    "batch_select_indices, tuple": (lambda cache: cache.batch_select_indices((0, 2)), [0, 2]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("operation", BATCH_OPERATIONS)
def test_batch_operations_equal_a_cache_built_afresh(model, operation, options):
    apply, rows = BATCH_OPERATIONS[operation]
    ids, first, after = prompts(3), prompts(3, 1, seed=2), prompts(3, 1, seed=3)
    cache = prefill(model, ids, **options)
    greedy(model, cache, first, num_tokens=2)
    apply(cache)
    fresh = prefill(model, ids[rows], **options)
    greedy(model, fresh, first[rows], num_tokens=2)
    assert torch.equal(greedy(model, cache, after[rows]), greedy(model, fresh, after[rows]))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"]
)
def test_copies_go_their_own_way(model, duplicate):
    cache = prefill(model, prompts(2), **KEPT)
    twin = duplicate(cache)
    first = prompts(2, 1, seed=2)
    expected = greedy(model, cache, first)
    assert twin.get_seq_length() == 24
    assert torch.equal(greedy(model, twin, first), expected)


def test_a_copy_looks_at_the_model_too(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    ids, first = prompts(2), prompts(2, 1, seed=2)
    twin = copy.deepcopy(prefill(model, ids))
    model.set_attn_implementation("sdpa")
    assert torch.equal(greedy(model, twin, first), greedy(model, prefill(model, ids), first))


def test_offloading(model, offloaded_cache):
    expected = generate(model, prompts(2), TurboQuantCache(model.config, **KEPT))
    assert torch.equal(generate(model, prompts(2), offloaded_cache(model.config, **KEPT)), expected)


def test_offloading_without_a_gpu_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="offloading moves layers off a CUDA device, and torch sees none"):
        TurboQuantCache(tiny_model.config, offloading=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the streams of a GPU")
@pytest.mark.parametrize("padded", [0, 6])
def test_offloading_from_a_gpu(model, padded):
    model, ids = copy.deepcopy(model).cuda(), prompts(2).cuda()
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    texts = []
    for offloading in (False, True):
        cache = TurboQuantCache(model.config, offloading=offloading, **KEPT)
        texts.append(generate(model, ids, cache, attention_mask=mask))
    assert torch.equal(*texts)
    assert cache.layers[-1].store.pages.tensor.device.type == "cpu"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(model, backend):
    ids, first = prompts(2), prompts(2, 1, seed=2)
    expected = greedy(model, prefill(model, ids, **KEPT), first, num_tokens=4)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(greedy(compiled, prefill(model, ids, **KEPT), first, num_tokens=4), expected)
    torch.compiler.reset()
