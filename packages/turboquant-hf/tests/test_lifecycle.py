"""What `generate` and its callers do to a cache, on the dequantising and on the fused path.

Two yardsticks: what the uncompressed cache says of the same text, which eight bits hardly change, and at four bits what
a cache built afresh says, because every operation picks codes and changes none.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from turboquant_core import KeyTransform
from turboquant_hf import TurboQuantCache
from turboquant_hf.storage.tables import MAX_STEP_TOKENS

KEPT = {"sink_tokens": 2, "recent_tokens": 5}
EXACT = {"key_bits": 8, "value_bits": 8, **KEPT}
ORDER = torch.arange(64).flip(0).repeat(2, 1)
SPLIT = {"preset": "tq3", "key_transforms": {index: KeyTransform(order=ORDER) for index in range(2)}}
OPTIONS = {"tq4": {}, "tq2.5": {"preset": "tq2.5"}, "tq4, sinks and recent tokens": KEPT, "tq3, split keys": SPLIT}
NEW_TOKENS = 10


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(scope="module")
def assistant(tiny_model):
    """Drafts of four tokens, of which the model accepts some."""
    assistant = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(7)
    for weights in assistant.parameters():
        weights.data += 0.003 * torch.randn(weights.shape, generator=generator)
    assistant.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    return assistant


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


def logits_along(model, cache, text):
    """Logits [batch_size, num_tokens, vocab_size] of a text int64 [batch_size, num_tokens], a token each call."""
    with torch.no_grad():
        return torch.cat([model(token, past_key_values=cache).logits for token in text.split(1, dim=1)], dim=1)


TEXTS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
}
CALLS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": ...},
    "chunked prefill": {"prefill_chunk_size": 7},
}


def calls(name, assistant):
    return {"assistant_model": assistant} if name == "assisted" else CALLS[name]


def uncompressed(model):
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_those_of_the_uncompressed_cache(model, text, assert_says_the_same):
    torch.manual_seed(1)
    cache = TurboQuantCache(model.config, **EXACT)
    assert_says_the_same(model, prompts(2), cache, uncompressed(model), **TEXTS[text])


@pytest.mark.parametrize("name", CALLS)
def test_calls_say_what_decoding_says_uncompressed(model, assistant, name, assert_says_the_same):
    ids = prompts(2 if name == "chunked prefill" else 1)
    cache = TurboQuantCache(model.config, **EXACT)
    assert_says_the_same(model, ids, cache, uncompressed(model), found_options=calls(name, assistant))


@pytest.mark.parametrize(
    "options",
    [{}, SPLIT, {"max_length": 64}, {"preset": "tq2.5"}],
    ids=["growing", "split keys", "static", "fractional bits"],
)
def test_a_cache_goes_on_outside_of_inference_mode(model, options, tmp_path):
    ids, more = prompts(2), prompts(2, 5, seed=12)

    def run(cache, mode):
        with mode:
            model(ids, past_key_values=cache)
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 0]))
            if options in ({}, SPLIT):
                cache.save(tmp_path / "cache.safetensors")
                cache = TurboQuantCache.load(tmp_path / "cache.safetensors", model.config)
        with torch.no_grad():
            return model(more, past_key_values=cache).logits

    logits = [run(TurboQuantCache(model.config, **options), mode) for mode in (torch.inference_mode(), torch.no_grad())]
    assert torch.equal(*logits)


@pytest.mark.parametrize("options", [{}, SPLIT], ids=["tq4", "split keys"])
@pytest.mark.parametrize("name", ["prompt lookup", "assisted"])
def test_verifying_drafts_says_what_decoding_says_of_codes(model, assistant, name, options, assert_says_the_same):
    # Dequantised, recent tokens would see each other as they are.
    kept = {} if model.config._attn_implementation == "turboquant" else {"recent_tokens": 0}
    caches = [TurboQuantCache(model.config, **kept, **options) for _ in range(2)]
    # A text that repeats itself has its drafts accepted.
    ids = prompts(1, 8).repeat(1, 4)
    assert_says_the_same(model, ids, *caches, found_options=calls(name, assistant))


def test_several_turns(model, assert_says_the_same):
    cache, expected, ids = TurboQuantCache(model.config, **EXACT), uncompressed(model), prompts(2)
    for turn in range(3):
        text = assert_says_the_same(model, ids, cache, expected)
        ids = torch.cat([text, prompts(2, 5, seed=turn)], dim=1)


@pytest.mark.parametrize("options", [EXACT, SPLIT], ids=["8 bits", "split keys"])
def test_left_padded_batches(model, options, assert_says_the_same):
    ids, mask = prompts(2), torch.ones(2, 30, dtype=torch.int64)
    mask[:, :6] = 0
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.int64), ids], dim=1)
    caches = [TurboQuantCache(model.config, **options) for _ in range(2)]
    assert_says_the_same(model, ids, *caches, found_options={"inputs": padded, "attention_mask": mask})


def test_rows_of_different_length(model, assert_says_the_same):
    ids, mask = prompts(2), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    ids[1, :9] = 0
    cache = TurboQuantCache(model.config, **EXACT)
    assert_says_the_same(model, ids, cache, uncompressed(model), attention_mask=mask)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_crop_equals_a_cache_built_afresh(model, options, assert_near):
    # What the window has room for can be taken back.
    ids, taken_back, text = prompts(2), prompts(2, MAX_STEP_TOKENS, seed=3), prompts(2, MAX_STEP_TOKENS, seed=2)
    cache = prefill(model, ids, **options)
    logits_along(model, cache, taken_back)
    cache.crop(-MAX_STEP_TOKENS)
    assert cache.get_seq_length() == ids.shape[1]
    found, expected = (logits_along(model, which, text) for which in (cache, prefill(model, ids, **options)))
    assert_near(found, expected)


def test_crop_takes_a_tensor(model, assert_near):
    """As transformers 5.17 passes it after drafts."""
    text, caches = prompts(2, NEW_TOKENS, seed=2), [prefill(model, prompts(2), recent_tokens=0) for _ in range(2)]
    for cache, tokens_to_remove in zip(caches, (torch.tensor(-3), -3), strict=True):
        cache.crop(tokens_to_remove)
    assert_near(*(logits_along(model, cache, text) for cache in caches))
    assert isinstance(caches[0].get_seq_length(), int)


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
def test_batch_operations_equal_a_cache_built_afresh(model, operation, options, assert_near):
    apply, rows = BATCH_OPERATIONS[operation]
    ids, before, after = prompts(3), prompts(3, 2, seed=2), prompts(3, NEW_TOKENS, seed=3)[rows]
    cache = prefill(model, ids, **options)
    logits_along(model, cache, before)
    apply(cache)
    fresh = prefill(model, ids[rows], **options)
    logits_along(model, fresh, before[rows])
    assert_near(logits_along(model, cache, after), logits_along(model, fresh, after))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("options", [KEPT, SPLIT], ids=["tq4", "split keys"])
def test_copies_go_their_own_way(model, options, duplicate):
    cache = prefill(model, prompts(2), **options)
    twin = duplicate(cache)
    text = prompts(2, NEW_TOKENS, seed=2)
    expected = logits_along(model, cache, text)
    assert twin.get_seq_length() == 24
    assert torch.equal(logits_along(model, twin, text), expected)


def test_a_copy_looks_at_the_model_too(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    ids, text = prompts(2), prompts(2, NEW_TOKENS, seed=2)
    twin = copy.deepcopy(prefill(model, ids))
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits_along(model, twin, text), logits_along(model, prefill(model, ids), text))


@pytest.mark.parametrize("options", [KEPT, SPLIT], ids=["tq4", "split keys"])
def test_offloading(model, options, offloaded_cache):
    expected = generate(model, prompts(2), TurboQuantCache(model.config, **options))
    assert torch.equal(generate(model, prompts(2), offloaded_cache(model.config, **options)), expected)


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
def test_torch_compile(model, backend, assert_near):
    ids, text = prompts(2), prompts(2, 4, seed=2)
    expected = logits_along(model, prefill(model, ids, **KEPT), text)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_near(logits_along(compiled, prefill(model, ids, **KEPT), text), expected)
    torch.compiler.reset()
