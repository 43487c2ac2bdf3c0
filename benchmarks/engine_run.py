"""Measure one engine of vLLM in this process, described in JSON, and write what was measured to a JSON file."""

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

# A batch is built in the process that waits for it, so that steps are timed and not messages.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM

# Of Llama-3.1-8B. Speed does not depend on the values of weights, so they are random.
VOCABULARY = 128256
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
DECODED = 128


def model_folder(folder: Path) -> str:
    """A model without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return str(folder)


def random_tokens(count: int, seed: int) -> list[int]:
    """Tokens that share no prefix with those of another seed."""
    draw = random.Random(seed)
    return [draw.randrange(10, 120_000) for _ in range(count)]


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly that many tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def measure_steps(engine: dict[str, Any], shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Prefill and decode step of every batch x context, and the tokens that the cache holds."""
    longest = max(context for _, context in shapes)
    llm = LLM(
        max_model_len=longest + DECODED + 16, max_num_seqs=max(batch for batch, _ in shapes), **engine
    )  # fmt: skip
    cache = llm.llm_engine.vllm_config.cache_config
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
    return {"kv_tokens": cache.num_gpu_blocks * cache.block_size, "rows": rows}


def measure_serving(engine: dict[str, Any], load: dict[str, int]) -> dict[str, Any]:
    """Conversations that come back with a new question each round, a fixed number of them at once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    arguments = AsyncEngineArgs(
        max_model_len=load["prefix"] + 1024, max_num_seqs=load["concurrency"], **engine
    )  # fmt: skip
    return asyncio.run(_serve(arguments, load))


async def _serve(arguments: AsyncEngineArgs, load: dict[str, int]) -> dict[str, Any]:
    engine = AsyncLLM.from_engine_args(arguments)
    gate = asyncio.Semaphore(load["concurrency"])
    prefixes = [random_tokens(load["prefix"], seed) for seed in range(load["conversations"])]

    async def ask(conversation: int, round_: int) -> tuple[float, float, int]:
        question = random_tokens(load["question"], 10**6 + 1000 * round_ + conversation)
        prompt = TokensPrompt(prompt_token_ids=prefixes[conversation] + question)
        async with gate:
            begin, first, cached = time.perf_counter(), 0.0, 0
            async for answer in engine.generate(prompt, greedy(load["answer"]), f"{round_}-{conversation}"):
                first = first or time.perf_counter()
                cached = answer.num_cached_tokens or cached
            end = time.perf_counter()
        return first - begin, (end - first) / (load["answer"] - 1), cached

    rounds = []
    order = random.Random(0)
    # A warm-up of other prompts, for what is still compiled or allocated late.
    prefixes.append(random_tokens(load["prefix"], load["conversations"]))
    await ask(load["conversations"], load["rounds"])
    for index in range(load["rounds"]):
        conversations = order.sample(range(load["conversations"]), load["conversations"])
        begin = time.perf_counter()
        answers = await asyncio.gather(*(ask(conversation, index) for conversation in conversations))
        wall = time.perf_counter() - begin
        ttft, tpot = (sorted(answer[part] for answer in answers) for part in (0, 1))
        prompt_tokens = load["conversations"] * (load["prefix"] + load["question"])
        rounds.append(
            {
                "wall_s": wall,
                "requests_per_s": len(answers) / wall,
                "output_tokens_per_s": len(answers) * load["answer"] / wall,
                "ttft_ms": {"median": ttft[len(ttft) // 2] * 1e3, "p95": ttft[int(len(ttft) * 0.95)] * 1e3},
                "tpot_ms": {"median": tpot[len(tpot) // 2] * 1e3, "p95": tpot[int(len(tpot) * 0.95)] * 1e3},
                "cached_share_of_prompts": sum(answer[2] for answer in answers) / prompt_tokens,
            }
        )
        print(rounds[-1], flush=True)
    engine.shutdown()
    return {"rounds": rounds}


def main() -> None:
    """Read the request, measure, write the answer."""
    request, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    engine = {
        "model": model_folder(answer.parent / "llama-3.1-8b-shape"),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "seed": 0,
        **request["engine"],
    }
    if request["measure"] == "steps":
        measured = measure_steps(engine, request["load"])
    else:
        measured = measure_serving(engine, request["load"])
    answer.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
