"""vLLM's engine on a GPU with real weights: CUDA graphs, drafts and sleep leave what it says as it is.

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
# Of float16's rounding and of 8-bit codes, along one text of 200 tokens.
NEAR = {"largest": 0.3, "mean": 0.02}
# Codes of six bits have four times the error of those of eight; a rounding that takes a coordinate over a boundary of
# four moves it by sixteen steps of eight.
NEAR_AT_SIX_BITS = {"largest": 0.6, "mean": 0.06}
NEAR_AT_FOUR_BITS = {"largest": 1.5, "mean": 0.15}
SCORED = {"prompt_logprobs": 50, "max_logprobs": 50}
EIGHT_BITS = {
    "attention_backend": "CUSTOM",
    "additional_config": {"turboquant": {"key_bits": 8, "value_bits": 8}},
}
FOUR_BITS = {"attention_backend": "CUSTOM"}
GRAPHS = {"enforce_eager": False}
DRAFT = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
FREE = {
    "uncompressed": SCORED,
    "drafts": {**EIGHT_BITS, **GRAPHS, "speculative_config": DRAFT},
}
ENGINES = {
    "graphs": {**EIGHT_BITS, **GRAPHS, **SCORED},
    "eager": EIGHT_BITS,
    "references": {**EIGHT_BITS, "references": True},
    "first_runner": {**EIGHT_BITS, **GRAPHS, "env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
    "offloading": {**EIGHT_BITS, **GRAPHS, "kv_offloading_size": 2, "rounds": 2, "forget": True},
    "skipped": {**EIGHT_BITS, **GRAPHS, "kv_cache_dtype_skip_layers": ["0", "1"]},
    "four_bits_references": {**FOUR_BITS, "references": True},
}
# Alone on the GPU: vLLM compares the free memory before and after.
SLEEPER = {**FOUR_BITS, **GRAPHS, **SCORED, "enable_sleep_mode": True, "sleep": [1, 2]}


@pytest.fixture(scope="module")
def run(generate, model_folder, story, keep):
    """Runs an engine: its answer, or why there is none."""

    def start(name, options, texts=None):
        """Along the texts, four for each time that the prompts are asked; without any, freely."""
        begin = time.perf_counter()
        prompts = [*QUESTIONS, story] * (1 if texts is None else len(texts) // 4)
        try:
            answer = generate(prompts, model=model_folder, forced=texts, **COMMON, **options)
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
    """What the uncompressed cache and drafts say freely, and what the others say along the former's texts."""
    engines = {**ENGINES, "layer_bits": {**layer_bits, **GRAPHS}}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(FREE, pool.map(run, FREE, FREE.values()), strict=True))
        texts = answer_of(found, "uncompressed")["tokens"][0]
        along = {
            name: [*texts, *answer_of(found, "drafts")["tokens"][0]] if name == "graphs" else texts for name in engines
        }
        found |= dict(zip(engines, pool.map(run, engines, engines.values(), along.values()), strict=True))
    return found


@pytest.fixture(scope="module")
def four_bits(run, answers):
    """The answer of the engine that sleeps: rounds before the first, after the first and after the second level."""
    return {"four_bits": run("four_bits", SLEEPER, answer_of(answers, "uncompressed")["tokens"][0])}


def answer_of(answers, name):
    if isinstance(answers[name], str):
        pytest.fail(f"the engine of {name} failed: {answers[name]}", pytrace=False)
    return answers[name]


@pytest.mark.parametrize("name", ["graphs", "first_runner", "offloading", "drafts", "layer_bits", "skipped"])
def test_decode_steps_are_full_graphs(answers, name):
    found = answer_of(answers, name)
    assert "FULL" in found["cudagraph_mode"]
    assert found["second_runner"] is (name != "first_runner")


@pytest.fixture
def check(figures, how_far):
    """Keeps how far one answer is from another, and holds it to bounds."""

    def compare(name, found, expected, bounds=NEAR):
        seen = how_far(found, expected)
        figures(**{f"{measure}_{name}": value for measure, value in seen.items()})
        assert all(seen[measure] < bound for measure, bound in bounds.items()), seen

    return compare


def test_eight_bits_say_what_the_uncompressed_cache_says(answers, texts_of, check):
    found, expected = answer_of(answers, "graphs"), answer_of(answers, "uncompressed")
    check("eight_bits", texts_of(found, slice(4)), expected)


@pytest.mark.parametrize("name", ["eager", "references", "first_runner", "offloading"])
def test_it_says_what_the_graphs_say(answers, name, texts_of, check):
    check(name, answer_of(answers, name), texts_of(answer_of(answers, "graphs"), slice(4)))


def test_drafts_say_what_the_graphs_say(answers, texts_of, check):
    check("drafts", answer_of(answers, "drafts"), texts_of(answer_of(answers, "graphs"), slice(4, 8)))


def test_skipped_layers_stay_uncompressed(answers, figures, check):
    found, expected = answer_of(answers, "skipped"), answer_of(answers, "uncompressed")
    figures(kv_tokens_skipped=found["kv_tokens"])
    check("skipped", found, expected)
    # 2 of 30 layers take 256 bytes a slot, the others 132.
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(30 * 256 / (2 * 256 + 28 * 132), rel=0.01)


def test_layers_with_bits_of_their_own(answers, figures, check):
    found, expected = answer_of(answers, "layer_bits"), answer_of(answers, "uncompressed")
    figures(kv_tokens_layer_bits=found["kv_tokens"])
    check("layer_bits", found, expected, NEAR_AT_SIX_BITS)
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


def test_four_bits_say_what_their_references_say(answers, four_bits, texts_of, check):
    found, expected = answer_of(four_bits, "four_bits"), answer_of(answers, "four_bits_references")
    check("four_bits", texts_of(found, slice(4)), expected, NEAR_AT_FOUR_BITS)


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
def test_it_says_after_a_sleep_what_it_said_before(four_bits, level, texts_of, check):
    found = answer_of(four_bits, "four_bits")
    assert "FULL" in found["cudagraph_mode"]
    check(f"sleep_{level}", texts_of(found, slice(4), round_=level), found, NEAR_AT_FOUR_BITS)
