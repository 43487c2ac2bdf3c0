"""A needle in a haystack: does a model find a sentence in what a cache kept of a long text?"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from turboquant_hf._compat import Cache, with_cache
from turboquant_hf.attending import reading_as_in_decoding
from turboquant_hf.tools.eval.prefill import fill
from turboquant_hf.tools.eval.results import NeedleScore

CITIES = ("Lisbon", "Oslo", "Quito", "Cairo", "Hanoi", "Lima", "Delhi", "Rome", "Accra", "Perth", "Kyoto", "Turin")
NUM_DIGITS = 7

STEP = 16
"""The caches of quanto and hqq pack several groups of a prompt together, and fail on other lengths."""


@dataclass(frozen=True)
class NeedlePrompt:
    """A text with a needle, and what is asked.

    Attributes:
        haystack: int64 [1, num_tokens], the text with the needle.
        question: int64 [1, num_tokens], the beginning of a sentence that the answer ends.
        answer: int64 [num_tokens].
    """

    haystack: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase, text_ids: torch.Tensor, length: int, depth: float, seed: int
) -> NeedlePrompt:
    """A prompt of at most `length` tokens, answer included, with the needle at `depth`.

    Args:
        tokenizer: The model's.
        text_ids: int64 [num_tokens], what the haystack is made of; repeated where it is too short.
        length: Tokens in all; up to 15 fewer, because a haystack has a multiple of `STEP` tokens.
        depth: Where the needle is: 0 for the beginning and 1 for the end of the haystack.
        seed: Picks what the needle says, for each length and depth anew.

    Raises:
        ValueError: If the needle and the question do not fit into the length.
    """
    # A string, because the hash of other things may differ from one process to the next.
    pick = random.Random(f"{seed} {length} {depth}")
    city, number = pick.choice(CITIES), "".join(pick.choices("123456789", k=NUM_DIGITS))
    needle = _encode(tokenizer, f"\nThe secret number of {city} is {number}.\n")
    asked = f"\nWhat is the secret number of {city}? The secret number of {city} is"
    question, whole = _encode(tokenizer, asked), _encode(tokenizer, f"{asked} {number}")
    shared = int((question == whole[: len(question)]).long().cumprod(0).sum())
    question, answer = whole[:shared], whole[shared:]
    num_hay = (length - len(whole)) // STEP * STEP - len(needle)
    if num_hay < 1:
        raise ValueError(
            f"a needle length of {length} tokens is too short; the needle and the question take "
            f"{len(needle) + len(whole)} of them. Ask for more."
        )
    hay = text_ids.repeat(-(-num_hay // len(text_ids)))[:num_hay]
    # The very first token may be the one that marks the beginning.
    at = max(1, round(depth * num_hay))
    haystack = torch.cat([hay[:at], needle, hay[at:]])
    return NeedlePrompt(haystack[None], question[None], answer)


@torch.no_grad()
def find_needle(model: PreTrainedModel, prompt: NeedlePrompt, caches: Mapping[str, Cache]) -> dict[str, NeedleScore]:
    """How much of the answer each cache leads to; the haystack is prefill, and the question reads what was kept."""
    device = model.device
    fill(model, prompt.haystack.to(device), caches.values())
    asked = torch.cat([prompt.question, prompt.answer[None, :-1]], dim=1).to(device)
    scores = {}
    for name, cache in caches.items():
        with reading_as_in_decoding(model, cache):
            logits = model(input_ids=asked, **with_cache(cache)).logits
        hits = logits[0, -len(prompt.answer) :].argmax(-1).cpu() == prompt.answer
        scores[name] = NeedleScore(share=float(hits.double().mean()), found=bool(hits.all()))
    return scores


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    encoded: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return encoded
