"""vLLM's engine with real weights."""

import math

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


STORY = """\
The Thames froze in the winter of 1683, and for two months Londoners built a town upon the ice. There were streets of
booths from Temple to Southwark, with barbers, bakers and printers, who set the names of visitors in type and sold
them the sheet as a memento. Coaches plied between Westminster and the Temple as if on a road; oxen were roasted whole
near Whitehall, and the King came down with his family to have their names printed too. John Evelyn, who kept a diary,
thought the fair a bacchanalian triumph, and noted that the smoke of sea coal hung so low that one could scarcely see
across the street. Trees split as if struck by lightning, deer died in the parks, and the poor, whose work on the
river had stopped, lived on what the parishes gave them. When the thaw came in February it came in a night: the booths
were pulled to the banks by torchlight, and by the morning the river was full of broken ice, barrels and planks. The
printers, it is said, made five pounds a day while it lasted, and the watermen, who had charged for the way down to
the ice, went back to their boats. Fairs were held again when the river froze in later winters, the last of them in
1814, when an elephant was led across below Blackfriars Bridge. Then the old London Bridge, whose narrow arches had
slowed the water, was replaced, the banks were built up, and the tide ran too fast for ice to hold. Nobody has walked
across the Thames in London since.
"""


def test_four_bits_stay_near_the_uncompressed_distribution(generate):
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
        generate([STORY], **chunks, **options)["prompt_logprobs"][0][0] for options in ({}, turboquant(preset="tq4"))
    )
    assert len(expected) > 300
    mean = sum(map(divergence, expected, found)) / len(expected)
    assert 0.001 < mean < 0.04


def divergence(expected, found):
    """KL divergence over the likeliest tokens that both name, and all others as one."""
    shared = expected.keys() & found.keys()
    pairs = [(math.exp(expected[token]), math.exp(found[token])) for token in shared]
    pairs.append(tuple(max(1 - sum(side), 1e-9) for side in zip(*pairs, strict=True)))
    return sum(p * math.log(p / q) for p, q in pairs)


def shortened(answer, max_tokens):
    """An answer as it would be with fewer tokens."""
    return {name: [[text[:max_tokens] for text in answer[name][0]]] for name in ("tokens", "logprobs")}
