"""How long greedy decoding from a cache stays with that from the uncompressed one."""

import torch
from transformers import PreTrainedModel

from turboquant_hf._compat import Cache, with_cache

NUM_PROMPTS = 4
PROMPT_TOKENS = 128


def greedy_prompts(text_ids: torch.Tensor) -> torch.Tensor:
    """Passages of a text, evenly spaced, int64 [NUM_PROMPTS, PROMPT_TOKENS]; text_ids are int64 [num_tokens]."""
    last = max(0, len(text_ids) - PROMPT_TOKENS)
    starts = [round(number * last / (NUM_PROMPTS - 1)) for number in range(NUM_PROMPTS)]
    return torch.stack([text_ids[start : start + PROMPT_TOKENS] for start in starts])


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: torch.Tensor, cache: Cache, num_tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt, greedily; nothing stops them before there are `num_tokens`.

    Args:
        model: The model.
        prompts: int64 [num_prompts, prompt_tokens].
        cache: Empty.
        num_tokens: Tokens of each continuation.
    """
    newest, chosen = prompts.to(model.device), []
    for _ in range(num_tokens):
        logits = model(input_ids=newest, **with_cache(cache), logits_to_keep=1).logits
        newest = logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(newest)
    tokens: list[list[int]] = torch.cat(chosen, dim=1).tolist()
    return tokens


def shared_length(tokens: list[int], others: list[int]) -> int:
    """Tokens until two continuations differ."""
    differ = (index for index, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1])
    return next(differ, len(tokens))
