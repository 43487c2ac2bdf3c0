"""How far a cache moves a model's next-token distributions: teacher-forced, with the cache really read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from turboquant_hf._compat import Cache, with_cache
from turboquant_hf.attending import reading_as_in_decoding

CHUNK_SIZE = 128
"""Tokens in one forward pass, unless others are asked for."""


@dataclass
class CacheScore:
    """Statistics over the tokens scored.

    Attributes:
        kl: KL(reference ‖ candidate) in nats of each next-token distribution, float64 [num_tokens].
        agrees: Whether both put the same token first, bool [num_tokens].
        nll: Negative log-likelihood of the text's own next token under the candidate, float64 [num_tokens].
    """

    kl: torch.Tensor
    agrees: torch.Tensor
    nll: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return len(self.kl)

    @property
    def mean_kl(self) -> float:
        """Mean KL per token in nats."""
        return float(self.kl.mean())

    @property
    def p99_kl(self) -> float:
        """99th percentile of KL per token in nats."""
        return float(self.kl.quantile(0.99))

    @property
    def top1_agreement(self) -> float:
        """Share of tokens on which both put the same token first."""
        return float(self.agrees.double().mean())

    @property
    def perplexity(self) -> float:
        """Perplexity of the text under the candidate."""
        return float(self.nll.mean().exp())

    def to_dict(self) -> dict[str, float | int]:
        """Plain data, for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "mean_kl": self.mean_kl,
            "p99_kl": self.p99_kl,
            "top1_agreement": self.top1_agreement,
            "perplexity": self.perplexity,
        }


@dataclass
class _Parts:
    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> None:
        self.kl.append(kl_divergence(reference, candidate).double().cpu())
        self.agrees.append((reference.argmax(-1) == candidate.argmax(-1)).cpu())
        self.nll.append(-candidate.gather(-1, targets[:, None]).squeeze(-1).double().cpu())

    def score(self) -> CacheScore:
        return CacheScore(torch.cat(self.kl), torch.cat(self.agrees), torch.cat(self.nll))


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ candidate) in nats of log probabilities [..., vocab_size], as [...]."""
    return (reference.exp() * (reference - candidate)).sum(-1)


# Not inference mode: its tensors cannot be written outside it, and the caches may be continued.
@torch.no_grad()
def score_caches(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    reference: Cache,
    candidates: Mapping[str, Cache],
    *,
    chunk_size: int = CHUNK_SIZE,
    on_forward: Callable[[], None] = lambda: None,
) -> dict[str, CacheScore]:
    """Feed a text through every cache, chunk by chunk, and compare next-token distributions.

    The first chunk fills the caches and is not scored, because prefill does not read them. From then on a chunk gives a
    `TurboQuantCache` what its tokens give one by one: where it keeps recent tokens, the model attends with "turboquant"
    meanwhile, which alone can tell them apart. Every cache ends up holding all of `input_ids`.

    Args:
        model: A decoder-only model.
        input_ids: int64 [1, num_tokens], more than one chunk.
        reference: An empty uncompressed cache.
        candidates: Empty caches by name.
        chunk_size: Tokens in one forward pass.
        on_forward: Called after each forward pass, of which there are
            ceil(num_tokens / chunk_size) for each cache.

    Returns:
        The scores of `reference` itself, under the name "reference", and of every candidate.

    Raises:
        ValueError: If the text fits in one chunk, is a batch, or a candidate is named "reference".
    """
    if input_ids.shape[0] != 1 or input_ids.shape[1] <= chunk_size + 1:
        raise ValueError(
            f"input_ids are {list(input_ids.shape)}; scoring takes one sequence longer than a chunk of {chunk_size} "
            "tokens. Pass a longer text or a smaller chunk_size."
        )
    if "reference" in candidates:
        raise ValueError("a candidate is named 'reference', which is the reference's own name")
    parts = {name: _Parts() for name in ("reference", *candidates)}
    for start in range(0, input_ids.shape[1], chunk_size):
        chunk = input_ids[:, start : start + chunk_size]
        targets = input_ids[0, start + 1 : start + 1 + chunk_size]
        expected = _next_token_log_probs(model, chunk, reference)[: len(targets)]
        on_forward()
        is_scored = start > 0 and len(targets) > 0
        if is_scored:
            parts["reference"].add(expected, expected, targets)
        for name, cache in candidates.items():
            with reading_as_in_decoding(model, cache):
                actual = _next_token_log_probs(model, chunk, cache)[: len(targets)]
            on_forward()
            if is_scored:
                parts[name].add(expected, actual, targets)
    return {name: part.score() for name, part in parts.items()}


def _next_token_log_probs(model: PreTrainedModel, chunk: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Log p of the next token at each position of a chunk, float32 [num_tokens, vocab_size]."""
    logits = model(input_ids=chunk, **with_cache(cache)).logits
    return logits[0].float().log_softmax(-1)
