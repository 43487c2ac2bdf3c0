"""Decoding speed of a cache beside the uncompressed one."""

import time

import torch
from transformers import PreTrainedModel

from turboquant_hf._compat import Cache, with_cache
from turboquant_hf.attending import attending
from turboquant_hf.attention.dispatch import ATTENTION
from turboquant_hf.tools.eval.prefill import fill
from turboquant_hf.tools.eval.results import Speed

ROUNDS = 4
TOKENS_PER_ROUND = 8


@torch.no_grad()
def decoding_speed(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, reference: Cache, *, on_codes: bool
) -> Speed:
    """Tokens that both caches decode in a second, greedily, after a text.

    They take turns, so that whatever else the machine does slows both.

    Args:
        model: The model.
        input_ids: int64 [1, num_tokens], the text.
        cache: An empty cache.
        reference: An empty uncompressed one.
        on_codes: Have the model attend with `attn_implementation="turboquant"` while it reads `cache`.
    """
    fill(model, input_ids, (cache, reference))
    plain = model.config._attn_implementation
    contestants = {"cache": (cache, ATTENTION if on_codes else plain), "reference": (reference, plain)}
    seconds = dict.fromkeys(contestants, 0.0)
    newest = dict.fromkeys(contestants, input_ids[:, -1:])
    for turn in range(1 + ROUNDS):
        for name, (held, attention) in contestants.items():
            with attending(model, attention):
                start = _now(model.device)
                for _ in range(TOKENS_PER_ROUND):
                    logits = model(input_ids=newest[name], **with_cache(held)).logits
                    newest[name] = logits[:, -1].argmax(-1, keepdim=True)
                # The first round compiles kernels and fills tables.
                seconds[name] += _now(model.device) - start if turn else 0.0
    num_tokens = ROUNDS * TOKENS_PER_ROUND
    return Speed(num_tokens / seconds["cache"], num_tokens / seconds["reference"])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
