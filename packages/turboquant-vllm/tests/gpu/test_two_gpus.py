"""vLLM's engine on two GPUs: ranks and stages say what one says."""

import time

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TOKENS = [{"prompt_token_ids": list(range(start, 400, 3))} for start in (3, 5)]
COMMON = {
    "skip_tokenizer_init": True,
    "dtype": "float16",
    "max_tokens": 60,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**30,
    "gpu_memory_utilization": 0.05,
    "enforce_eager": False,
    "attention_backend": "CUSTOM",
    "additional_config": {"turboquant": {"key_bits": 8, "value_bits": 8}},
}
PARALLEL = {"ranks": {"tensor_parallel_size": 2}, "stages": {"pipeline_parallel_size": 2}}


@pytest.fixture(scope="module")
def run(generate, tiny_model, keep):
    def start(name, **options):
        begin = time.perf_counter()
        answer = generate(TOKENS, model=tiny_model("Llama"), **COMMON, **options)
        keep(f"{name}.json", answer | {"seconds": time.perf_counter() - begin})
        return answer

    return start


@pytest.mark.parametrize("name", PARALLEL)
def test_two_gpus_say_what_one_says(run, name, figures, assert_near):
    expected = run("one GPU")
    found = run(name, forced=expected["tokens"][0], **PARALLEL[name])
    figures(**{f"kv_tokens_{name}": found["kv_tokens"], "kv_tokens_one_gpu": expected["kv_tokens"]})
    assert_near(found, expected)
    # A rank holds half of the heads, or of the layers, in as much memory as one GPU does.
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(2, rel=0.01)
