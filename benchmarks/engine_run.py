"""Measure one engine of vLLM in this process, described in JSON, and write what was measured to a JSON file."""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

# The engine steps in this process, so that steps are timed and not messages.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from llama_8b import MODEL, ROPE_THETA, SIZES
from turboquant_core.calibration import Calibration, write_calibration
from turboquant_core.model_identity import ModelIdentity
from turboquant_core.pair_transform import pair_transform

ARCHITECTURE = "LlamaForCausalLM"
CONFIG = {
    **SIZES,
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": ROPE_THETA,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
DECODED = 128
WARM_UP_TOKENS = 2000


def model_folder(folder: Path) -> str:
    """A model without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def calibration_file(model: str, folder: Path) -> str:
    """A calibration of arbitrary statistics: nothing is faster or slower for what they are."""
    generator = torch.Generator().manual_seed(0)
    half = MODEL.head_dim // 2

    def energy() -> torch.Tensor:
        return torch.rand(MODEL.num_kv_heads, MODEL.head_dim, generator=generator) + 0.1

    layers = {
        index: pair_transform(energy(), energy(), energy(), torch.arange(MODEL.head_dim) % half)
        for index in range(MODEL.num_layers)
    }
    identity = ModelIdentity.of(AutoConfig.from_pretrained(model).get_text_config(), ARCHITECTURE)
    path = folder / "calibration.safetensors"
    write_calibration(path, Calibration(layers, identity, source="arbitrary statistics", num_tokens=1))
    return str(path)


def random_tokens(count: int, seed: int) -> list[int]:
    """Tokens that share no prefix with those of another seed."""
    draw = random.Random(seed)
    return [draw.randrange(10, 120_000) for _ in range(count)]


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly that many tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def measure_steps(llm: LLM, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Prefill and decode step of every batch x context."""
    rows = []
    for index, (batch, context) in enumerate(shapes):
        prompts = [TokensPrompt(prompt_token_ids=random_tokens(context, 1000 * index + row)) for row in range(batch)]

        def seconds(num_tokens: int, prompts: list[TokensPrompt] = prompts) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            llm.generate(prompts, greedy(num_tokens), use_tqdm=False)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        # The prompts come from the prefix cache after the first call; what is left of it is in both of the others.
        prefill = seconds(1)
        first, full = (min(seconds(num_tokens) for _ in range(2)) for num_tokens in (1, 1 + DECODED))
        step = (full - first) / DECODED
        rows.append({"batch": batch, "context": context, "prefill_s": prefill, "decode_step_ms": step * 1e3})
        print(rows[-1], flush=True)
        llm.reset_prefix_cache()
    return rows


class Conversations:
    """Conversations that come back with a new question each round, a fixed number of them at once."""

    def __init__(self, llm: LLM, load: dict[str, int]) -> None:
        self.llm, self.load = llm, load
        self.prefixes = [random_tokens(load["prefix"], 10**6 + number) for number in range(load["conversations"])]

    def warm_up(self) -> None:
        """Answer other prompts at the same concurrency, twice: what is compiled at first use is compiled then."""
        prompts = [
            TokensPrompt(prompt_token_ids=random_tokens(WARM_UP_TOKENS, 10**8 + number))
            for number in range(self.load["concurrency"])
        ]
        for _ in range(2):
            self.llm.generate(prompts, greedy(self.load["answer"]), use_tqdm=False)
        self.llm.reset_prefix_cache()

    def run_round(self, number: int) -> dict[str, Any]:
        """Ask every conversation once, in another order each round, and time every answer."""
        engine, load = self.llm.llm_engine, self.load
        waiting = random.Random(number).sample(range(load["conversations"]), load["conversations"])
        asked: dict[str, float] = {}
        first: dict[str, float] = {}
        ttft, tpot, cached = [], [], 0
        begin = time.perf_counter()
        while waiting or asked:
            while waiting and len(asked) < load["concurrency"]:
                conversation = waiting.pop()
                question = random_tokens(load["question"], 10**7 + 1000 * number + conversation)
                prompt = TokensPrompt(prompt_token_ids=self.prefixes[conversation] + question)
                request = f"{number}-{conversation}"
                asked[request] = time.perf_counter()
                engine.add_request(request, prompt, greedy(load["answer"]))
            for answer in engine.step():
                now, request = time.perf_counter(), answer.request_id
                if request not in first:
                    first[request] = now
                    ttft.append(now - asked[request])
                    cached += answer.num_cached_tokens or 0
                if answer.finished:
                    tpot.append((now - first[request]) / (load["answer"] - 1))
                    del asked[request]
        wall = time.perf_counter() - begin
        return {
            "wall_s": wall,
            "requests_per_s": load["conversations"] / wall,
            "output_tokens_per_s": load["conversations"] * load["answer"] / wall,
            "ttft_ms": quantiles(ttft),
            "tpot_ms": quantiles(tpot),
            "cached_share_of_prompts": cached / (load["conversations"] * (load["prefix"] + load["question"])),
        }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    return {"median": ordered[len(ordered) // 2] * 1e3, "p95": ordered[int(len(ordered) * 0.95)] * 1e3}


def main() -> None:
    """Read the request, measure, write the answer."""
    request, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    shapes, load = request["shapes"], request["load"]
    longest = max([load["prefix"] + load["question"] + load["answer"], *(context + DECODED for _, context in shapes)])
    model = model_folder(answer.parent / "llama-3.1-8b-shape")
    if request["calibrated"]:
        settings = {"calibration": calibration_file(model, answer.parent)}
        request["engine"]["additional_config"] = {"turboquant": settings}
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        seed=0,
        max_model_len=longest + 16,
        max_num_seqs=max(batch for batch, _ in shapes),
        **request["engine"],
    )
    cache = llm.llm_engine.vllm_config.cache_config
    measured: dict[str, Any] = {"kv_tokens": cache.num_gpu_blocks * cache.block_size}
    if "steps" in request["parts"]:
        measured["steps"] = measure_steps(llm, shapes)
        answer.write_text(json.dumps(measured))
    if "serving" in request["parts"]:
        conversations = Conversations(llm, load)
        conversations.warm_up()
        measured["serving"] = []
        for number in range(load["rounds"]):
            measured["serving"].append(conversations.run_round(number))
            answer.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
