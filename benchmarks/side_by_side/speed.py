"""Decoding speed of several caches, measured in turns."""

import time
from collections.abc import Mapping

import torch
from transformers import Cache, PreTrainedModel

from turboquant_hf._compat import with_cache


@torch.inference_mode()
def tokens_per_second(model: PreTrainedModel, caches: Mapping[str, Cache], num_tokens: int) -> dict[str, float]:
    """Tokens that each cache decodes in a second, greedily, with what it holds as the context.

    The caches take turns, one token each, so that whatever else the machine does slows all of them.

    Args:
        model: The model.
        caches: Filled caches by name.
        num_tokens: Tokens that each decodes. A multiple of a cache's window shows what emptying it costs.
    """
    seconds = dict.fromkeys(caches, 0.0)
    newest = {name: torch.zeros(1, 1, dtype=torch.int64, device=model.device) for name in caches}
    for _ in range(num_tokens):
        for name, cache in caches.items():
            start = time.perf_counter()
            logits = model(input_ids=newest[name], **with_cache(cache)).logits
            newest[name] = logits[:, -1].argmax(-1, keepdim=True)
            seconds[name] += time.perf_counter() - start
    return {name: num_tokens / spent for name, spent in seconds.items()}
