"""Answers and scores of a few caches, side by side."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from turboquant_hf._compat import Cache, with_cache
from turboquant_hf.memory import memory_report
from turboquant_hf.scoring import CHUNK_SIZE, CacheScore, score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.caches import CACHES, UNCOMPRESSED
from turboquant_hf.tools.models import LoadedModel

COMPARED = (UNCOMPRESSED, "tq4", "k6v4", "tq3", "tq2")
"""Names of caches."""

CHAT_PROMPT = "What is the capital of France, and what is it known for? Answer in two sentences."
QUESTION = "What is this text about? Answer in one sentence."
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class CacheRun:
    """What one cache gave.

    Attributes:
        cache: "uncompressed" or a preset.
        chat_answer: Greedy answer to the chat prompt.
        long_answer: Greedy answer to the question about the long text.
        tokens_per_second: Decoding speed with the long text in the cache.
        bytes_per_token: Allocated bytes for each token of the long prompt and its answer.
        compression: bfloat16 bytes over allocated bytes.
        score: Next-token distributions on the long prompt, compared with the uncompressed cache's.
    """

    cache: str
    chat_answer: str
    long_answer: str
    tokens_per_second: float
    bytes_per_token: float
    compression: float
    score: CacheScore


@dataclass(frozen=True)
class DemoResult:
    """All runs on one model."""

    model: str
    device: str
    dtype: str
    torch_version: str
    chat_prompt: str
    long_prompt_tokens: int
    question: str
    seconds: float
    runs: tuple[CacheRun, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            **{key: value for key, value in vars(self).items() if key != "runs"},
            "runs": [
                {**{k: v for k, v in vars(run).items() if k != "score"}, **run.score.to_dict()} for run in self.runs
            ],
        }


def num_steps(num_tokens: int) -> int:
    """How often `run_demo` calls `on_step` for a long prompt of that many tokens."""
    num_chunks = -(-(num_tokens - 1) // CHUNK_SIZE)
    return len(COMPARED) * (num_chunks + 2)


def encode_long_prompt(loaded: LoadedModel) -> torch.Tensor:
    """The long text and the question, int64 [1, num_tokens]."""
    return _encode(loaded, f"{article()}\n{QUESTION}")


def run_demo(loaded: LoadedModel, long_ids: torch.Tensor, on_step: Callable[[], None] = lambda: None) -> DemoResult:
    """Answer both prompts with every cache and score every cache on the long one.

    Args:
        loaded: The model.
        long_ids: The long prompt, from `encode_long_prompt`.
        on_step: Called after each step, for a progress bar.
    """
    start = time.perf_counter()
    model = loaded.model
    chat_ids = _encode(loaded, CHAT_PROMPT)
    chat_answers = {}
    for name in COMPARED:
        chat_answers[name], _ = _answer(loaded, chat_ids, CACHES[name].new(model.config))
        on_step()
    caches = {name: CACHES[name].new(model.config) for name in COMPARED}
    compressed = {name: cache for name, cache in caches.items() if name != UNCOMPRESSED}
    scores = score_caches(model, long_ids[:, :-1], caches[UNCOMPRESSED], compressed, on_forward=on_step)
    scores[UNCOMPRESSED] = scores.pop("reference")
    runs = []
    for name, cache in caches.items():
        answer, speed = _answer(loaded, long_ids, cache)
        report = memory_report(cache.layers)
        runs.append(
            CacheRun(
                cache=name,
                chat_answer=chat_answers[name],
                long_answer=answer,
                tokens_per_second=speed,
                bytes_per_token=report.bytes_per_token,
                compression=report.compression,
                score=scores[name],
            )
        )
        on_step()
    return DemoResult(
        model=loaded.name,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        torch_version=torch.__version__,
        chat_prompt=CHAT_PROMPT,
        long_prompt_tokens=long_ids.shape[1],
        question=QUESTION,
        seconds=time.perf_counter() - start,
        runs=tuple(runs),
    )


def _encode(loaded: LoadedModel, prompt: str) -> torch.Tensor:
    tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    return encoded["input_ids"].to(loaded.model.device)


def _answer(loaded: LoadedModel, input_ids: torch.Tensor, cache: Cache) -> tuple[str, float]:
    """Greedy answer, and new tokens per second."""
    start = time.perf_counter()
    output = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **with_cache(cache),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )
    new_tokens = output[0, input_ids.shape[1] :]
    speed = len(new_tokens) / (time.perf_counter() - start)
    return loaded.tokenizer.decode(new_tokens, skip_special_tokens=True).strip(), speed
