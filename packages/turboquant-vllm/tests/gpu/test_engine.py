"""vLLM's engine on a GPU with real weights: CUDA graphs, drafts and sleep leave the text as it is.

The engines run a few at a time in processes of their own; `--out` keeps what they said.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from turboquant_core.layer_bits import LayerBits, write_layer_bits
from turboquant_core.model_identity import ModelIdentity

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = [
    CHAT.format("Explain how a mechanical clock works."),
    CHAT.format("Write a short story about a clockmaker and a river."),
    CHAT.format("What should one know before keeping bees?"),
]
# A few engines share the GPU. Prompts come in chunks, so that they read codes too. Logits of this model reach 40, where
# bfloat16 would round them to quarters.
COMMON = {
    "dtype": "float16",
    "max_tokens": 200,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 2**30,
    "gpu_memory_utilization": 0.05,
}
AT_ONCE = 4
FOUR_BIT_TIE = 0.4
# Six bits are a sixteenth of their error.
LAYER_BITS_TIE = 0.2
SCORED = {"prompt_logprobs": 50, "max_logprobs": 50}
EIGHT_BITS = {
    "attention_backend": "CUSTOM",
    "additional_config": {"turboquant": {"key_bits": 8, "value_bits": 8}},
}
FOUR_BITS = {"attention_backend": "CUSTOM"}
GRAPHS = {"enforce_eager": False}
DRAFT = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
ENGINES = {
    "uncompressed": SCORED,
    "graphs": {**EIGHT_BITS, **GRAPHS, **SCORED},
    "eager": EIGHT_BITS,
    "references": {**EIGHT_BITS, "references": True},
    "first_runner": {**EIGHT_BITS, **GRAPHS, "env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "drafts": {**EIGHT_BITS, **GRAPHS, "speculative_config": DRAFT},
    "offloading": {**EIGHT_BITS, **GRAPHS, "kv_offloading_size": 2, "rounds": 2, "forget": True},
    "skipped": {**EIGHT_BITS, **GRAPHS, "kv_cache_dtype_skip_layers": ["0", "1"]},
    "four_bits_references": {**FOUR_BITS, "references": True},
}
# Alone on the GPU: vLLM compares the free memory before and after.
SLEEPER = {**FOUR_BITS, **GRAPHS, **SCORED, "enable_sleep_mode": True, "sleep": [1, 2]}


@pytest.fixture(scope="module")
def run(generate, model_folder, story, keep):
    """Runs an engine: its answer, or why there is none."""

    def start(name, options):
        begin = time.perf_counter()
        try:
            answer = generate([*QUESTIONS, story], model=model_folder, **COMMON, **options)
        except AssertionError as error:
            keep(f"{name}.log", str(error))
            return str(error)[-1500:]
        keep(f"{name}.json", answer | {"seconds": time.perf_counter() - begin})
        return answer

    return start


@pytest.fixture(scope="module")
def layer_bits(model_folder, tmp_path_factory):
    """A file of bits: 8 in every other layer, 6 for the keys or the values of those between them."""
    config = transformers.AutoConfig.from_pretrained(model_folder)
    bits = {index: ((8, 8), (6, 8), (8, 8), (8, 6))[index % 4] for index in range(config.num_hidden_layers)}
    path = tmp_path_factory.mktemp("bits") / "bits.json"
    write_layer_bits(path, LayerBits(bits, ModelIdentity.of(config, config.architectures[0]), str(model_folder)))
    return {"attention_backend": "CUSTOM", "additional_config": {"turboquant": {"layer_bits": str(path)}}}


@pytest.fixture(scope="module")
def answers(run, layer_bits):
    engines = {**ENGINES, "layer_bits": {**layer_bits, **GRAPHS}}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(engines, pool.map(run, engines, engines.values()), strict=True))


@pytest.fixture(scope="module")
def four_bits(run, answers):
    """The answer of the engine that sleeps: rounds before the first, after the first and after the second level."""
    return {"four_bits": run("four_bits", SLEEPER)}


def answer_of(answers, name):
    if isinstance(answers[name], str):
        pytest.fail(f"the engine of {name} failed: {answers[name]}", pytrace=False)
    return answers[name]


def same_texts(found, expected):
    """How many texts are the same to the last token."""
    pairs = zip(found["tokens"][-1], expected["tokens"][0], strict=True)
    return sum(text == other for text, other in pairs)


@pytest.mark.parametrize("name", ["graphs", "first_runner", "drafts", "layer_bits", "skipped"])
def test_decode_steps_are_full_graphs(answers, name):
    found = answer_of(answers, name)
    assert "FULL" in found["cudagraph_mode"]
    assert found["second_runner"] is (name != "first_runner")


def test_eight_bits_give_the_text_of_the_uncompressed_cache(answers, figures, assert_same_but_for_ties):
    found, expected = answer_of(answers, "graphs"), answer_of(answers, "uncompressed")
    figures(same_texts_eight_bits=same_texts(found, expected))
    assert_same_but_for_ties(found, expected)


@pytest.mark.parametrize("name", ["eager", "references", "first_runner", "drafts", "offloading"])
def test_the_text_is_that_of_the_graphs(answers, name, figures, assert_same_but_for_ties):
    found, expected = answer_of(answers, name), answer_of(answers, "graphs")
    figures(**{f"same_texts_{name}": same_texts(found, expected)})
    assert_same_but_for_ties(found, expected)


def test_skipped_layers_stay_uncompressed(answers, figures, assert_same_but_for_ties):
    found, expected = answer_of(answers, "skipped"), answer_of(answers, "uncompressed")
    figures(same_texts_skipped=same_texts(found, expected), kv_tokens_skipped=found["kv_tokens"])
    assert_same_but_for_ties(found, expected)
    # 2 of 30 layers take 256 bytes a slot, the others 132.
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(30 * 256 / (2 * 256 + 28 * 132), rel=0.01)


def test_layers_with_bits_of_their_own(answers, figures, assert_same_but_for_ties):
    found, expected = answer_of(answers, "layer_bits"), answer_of(answers, "uncompressed")
    figures(same_texts_layer_bits=same_texts(found, expected), kv_tokens_layer_bits=found["kv_tokens"])
    assert_same_but_for_ties(found, expected, tie=LAYER_BITS_TIE)
    # Four layers take 2 x 132 and 2 x 116 bytes a slot.
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(256 / 124, rel=0.03)


def test_drafts_are_accepted(answers, figures):
    found = answer_of(answers, "drafts")
    figures(drafted=found["drafted"], accepted=found["accepted"])
    assert found["drafted"] >= found["accepted"] > 0


def test_pages_come_back_from_the_memory_of_the_cpu(answers, figures):
    found = answer_of(answers, "offloading")
    figures(cached_in_memory_of_the_cpu=found["cached"][1][-1])
    assert found["cached"][0][-1] == 0
    assert found["cached"][1][-1] >= 256


def test_four_bits_give_the_text_of_the_references(answers, four_bits, figures, assert_same_but_for_ties):
    found, expected = answer_of(four_bits, "four_bits"), answer_of(answers, "four_bits_references")
    first = found | {"tokens": found["tokens"][:1]}
    figures(same_texts_four_bits=same_texts(first, expected))
    # A rounding that takes a coordinate over a boundary moves it by a step of four bits.
    assert_same_but_for_ties(first, expected, tie=FOUR_BIT_TIE)


def test_the_distribution_stays_near_the_uncompressed_one(answers, four_bits, figures, mean_divergence):
    expected = answer_of(answers, "uncompressed")["prompt_logprobs"][0][-1]
    eight = mean_divergence(answer_of(answers, "graphs")["prompt_logprobs"][0][-1], expected)
    four = mean_divergence(answer_of(four_bits, "four_bits")["prompt_logprobs"][0][-1], expected)
    figures(scored_tokens=len(expected), kl_eight_bits=eight, kl_four_bits=four)
    assert len(expected) > 300
    assert eight < 0.002
    assert 0.001 < four < 0.04


def test_the_cache_holds_as_many_more_tokens_as_its_slots_are_smaller(answers, figures):
    found, expected = (answer_of(answers, name)["kv_tokens"] for name in ("four_bits_references", "uncompressed"))
    figures(kv_tokens_four_bits=found, kv_tokens_uncompressed=expected)
    # At head_dim 64 a slot takes 256 bytes of float16, and 68 of codes and scales.
    assert found / expected == pytest.approx(256 / 68, rel=0.01)


@pytest.mark.parametrize("level", [1, 2])
def test_the_text_after_a_sleep_is_that_before(four_bits, level, assert_same_but_for_ties):
    found = answer_of(four_bits, "four_bits")
    assert "FULL" in found["cudagraph_mode"]
    assert_same_but_for_ties(found | {"tokens": found["tokens"][: level + 1]}, found)
