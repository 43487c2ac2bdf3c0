"""The model "turboquant-hf" of lm-evaluation-harness: every request reads a compressed cache.

Importing this module registers it. `python -m turboquant_hf.tools.eval.harness` is the harness's own command line with
it.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from turboquant_hf._compat import CACHE_ARGUMENT, Cache, with_cache
from turboquant_hf.attending import reading_as_in_decoding
from turboquant_hf.scoring import CHUNK_SIZE
from turboquant_hf.tools.caches import find_cache
from turboquant_hf.tools.models import load_model

MODEL = "turboquant-hf"

Request = tuple[Any, list[int], list[int]]


@register_model(MODEL)
class TurboQuantLM(HFLM):
    """A model of transformers that attends on what a cache kept.

    A context is a prompt, and attends on its own keys and values, as in serving; what follows it, generated or given,
    reads the cache. The harness's own class scores a continuation in one forward pass, which reads none.

    Args:
        pretrained: A hub id, a folder or a GGUF file.
        cache: A preset, "uncompressed", or another cache that `turboquant eval` knows.
        device: A torch device; cuda where there is one unless given.
        dtype: Of the weights; "auto" is float32 on a CPU, and what the checkpoint has elsewhere.
        attn_implementation: As for `from_pretrained`; what the model has unless given.
        **kwargs: What the harness's class takes for a model that is loaded already, such as `batch_size` for
            generation, and `max_length`.

    Raises:
        ValueError: If the cache, dtype or attention does not exist, or the cache cannot hold the model.
        OSError: If there is no such model.
    """

    def __init__(
        self,
        pretrained: str,
        cache: str = "tq4",
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._named_cache = find_cache(cache)
        named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
        if named != "auto" and not isinstance(named, torch.dtype):
            raise ValueError(f"dtype is {dtype}; it must be auto, or a type of torch, such as bfloat16")
        loaded = load_model(pretrained, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(named, torch.dtype):
            loaded.model.to(named)
        if attn_implementation is not None:
            loaded.model.set_attn_implementation(attn_implementation)
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **kwargs)

    def _new_cache(self) -> Cache:
        return self._named_cache.new(self.model.config)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, **{CACHE_ARGUMENT: self._new_cache()}, **kwargs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether greedy decoding gives it.

        Contexts that several continuations share, as the choices of a question do, are read once.

        Args:
            requests: What is asked, the context's tokens and the continuation's.
            disable_tqdm: Show no progress.
            override_bs: Unused: one request at a time.
        """
        order = sorted(range(len(requests)), key=lambda index: requests[index][1])
        answers: dict[int, tuple[float, bool]] = {}
        held: _Prompt | None = None
        for index in tqdm(order, disable=disable_tqdm or self.rank != 0, desc="loglikelihood from the cache"):
            asked, context, continuation = requests[index]
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            prompt, is_scored = _prompt(tokens, len(continuation))
            if held is None or (held.tokens, held.is_scored) != (prompt, is_scored):
                cache = self._new_cache()
                held = _Prompt(prompt, is_scored, self._logits(prompt, cache, keep=0 if is_scored else 1), cache)
            answers[index] = self._score(held, tokens[len(prompt) :], continuation)
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _score(self, prompt: "_Prompt", rest: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The answer to one request; `rest` is what follows the prompt."""
        cache = deepcopy(prompt.cache)
        pieces = [prompt.logits] if prompt.is_scored else []
        # The last token predicts nothing.
        for start in range(0, len(rest) - 1, CHUNK_SIZE):
            chunk = rest[start : min(start + CHUNK_SIZE, len(rest) - 1)]
            pieces.append(self._logits(chunk, cache))
        total, is_greedy, done = 0.0, True, 0
        for logits in pieces:
            targets = torch.tensor(continuation[done : done + len(logits)], device=self.device)
            total += float(logits.log_softmax(-1).gather(-1, targets[:, None]).sum())
            is_greedy = is_greedy and bool((logits.argmax(-1) == targets).all())
            done += len(logits)
        return total, is_greedy

    @torch.no_grad()
    def _logits(self, tokens: list[int], cache: Cache, keep: int = 0) -> torch.Tensor:
        """Logits after each of some tokens, or the last `keep` of them, float32 [num_tokens, vocab_size]."""
        input_ids = torch.tensor([tokens], device=self.device)
        with reading_as_in_decoding(self.model, cache):
            logits = self.model(input_ids=input_ids, **with_cache(cache), logits_to_keep=keep).logits
        return logits[0].float()


@dataclass(frozen=True)
class _Prompt:
    """What was prefilled.

    Attributes:
        tokens: The prompt.
        is_scored: Whether its own tokens are scored, because there is no context.
        logits: [num_tokens, vocab_size], after each of its tokens if they are scored.
        cache: Holds it.
    """

    tokens: list[int]
    is_scored: bool
    logits: torch.Tensor
    cache: Cache


def _prompt(tokens: list[int], num_scored: int) -> tuple[list[int], bool]:
    """The tokens that are prefill, and whether any of them is scored.

    A context but for its last token, which then reads what was kept of the others. Where the context is one token, as
    for the windows of a long text, it is a chunk as in `score_caches`, and scored although it reads no cache.
    """
    num_context = len(tokens) - num_scored
    if num_context > 1:
        return tokens[: num_context - 1], False
    return tokens[: CHUNK_SIZE if len(tokens) > CHUNK_SIZE + 1 else 1], True


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
