"""vLLM's engine with real weights."""

import pytest

pytestmark = pytest.mark.real_weights

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LONG = (
    "The old clockmaker told the children about the river, the mill and the winter when the clocks stood still. " * 12
)
PROMPTS = [
    CHAT.format("Explain how a mechanical clock works."),
    CHAT.format("Write a short story about a clockmaker and a river."),
    CHAT.format(LONG + "What is this about?"),
]


def turboquant(**settings):
    return {"attention_backend": "CUSTOM", "additional_config": {"turboquant": settings}}


EIGHT_BITS = turboquant(key_bits=8, value_bits=8)


@pytest.fixture(scope="module")
def uncompressed(generate):
    return generate(PROMPTS, max_tokens=200)


@pytest.fixture(scope="module")
def eight_bits(generate):
    return generate(PROMPTS, max_tokens=200, **EIGHT_BITS)


def test_eight_bits_give_the_same_text_over_two_hundred_tokens(eight_bits, uncompressed, assert_same_but_for_ties):
    assert eight_bits["tokens"][0][0] == uncompressed["tokens"][0][0]
    assert_same_but_for_ties(eight_bits, uncompressed)


def test_the_prefix_cache_gives_codes_to_the_next_request(generate, eight_bits, assert_same_but_for_ties):
    found = generate(PROMPTS, max_tokens=30, rounds=2, **EIGHT_BITS)
    assert found["cached"][0][2] == 0
    assert found["cached"][1][2] >= 128
    assert_same_but_for_ties(found, shortened(eight_bits, 30))


def test_prefill_in_chunks_reads_the_codes_of_earlier_chunks(generate, eight_bits, assert_same_but_for_ties):
    found = generate(PROMPTS, max_tokens=30, max_num_batched_tokens=64, max_num_seqs=8, **EIGHT_BITS)
    assert_same_but_for_ties(found, shortened(eight_bits, 30))


def test_speculation_does_not_change_the_text(generate, eight_bits, assert_same_but_for_ties):
    draft = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    found = generate(PROMPTS, max_tokens=60, speculative_config=draft, **EIGHT_BITS)
    assert found["accepted"] > 0
    assert_same_but_for_ties(found, shortened(eight_bits, 60))


@pytest.mark.parametrize(("preset", "slot_bytes"), [("tq4", 68), ("k8v4", 100)])
def test_the_cache_holds_as_many_more_tokens_as_its_slots_are_smaller(generate, uncompressed, preset, slot_bytes):
    found = generate(PROMPTS[:1], max_tokens=2, **turboquant(preset=preset))
    # Of float32 a slot takes 512 bytes at head_dim 64; whole blocks fit.
    assert found["kv_tokens"] / uncompressed["kv_tokens"] == pytest.approx(512 / slot_bytes, rel=0.01)


def test_four_bits_stay_near_the_uncompressed_distribution(generate, story, mean_divergence):
    """Mean KL of the next token; the cache of turboquant-hf costs this model 0.039 nats (`turboquant demo`)."""
    # In chunks of 32 almost all that a token sees are codes.
    chunks = {
        "max_tokens": 1,
        "prompt_logprobs": 50,
        "max_logprobs": 50,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
    }
    expected, found = (
        generate([story], **chunks, **options)["prompt_logprobs"][0][0] for options in ({}, turboquant(preset="tq4"))
    )
    assert len(expected) > 300
    assert 0.001 < mean_divergence(found, expected) < 0.04


def shortened(answer, max_tokens):
    """An answer as it would be with fewer tokens."""
    return {name: [[text[:max_tokens] for text in answer[name][0]]] for name in ("tokens", "logprobs")}
