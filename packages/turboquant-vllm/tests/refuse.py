"""Start engines that should be refused."""

from vllm import LLM

import processes


def refusals(asked):
    """What engines of vLLM's LLM are refused with, for each of several options."""
    return [_refusal(options) for options in asked]


def _refusal(options):
    try:
        LLM(skip_tokenizer_init=True, dtype=processes.DTYPE, enforce_eager=True, max_model_len=256, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "served"
