"""Processors of logits that make an engine generate a given text, while its logprobs stay the model's own."""

import os
from importlib.util import find_spec

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "forced"
"""The name among a request's extra arguments of the token ids that it is to generate."""
SECOND_RUNNERS = "vllm.v1.worker.gpu.sample.logits_processor"


class ForcedText(AdapterLogitsProcessor):
    """For the first model runner, the only one on CPUs."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        text = _text_of(params)
        return None if text is None else lambda generated, logits: _only(logits, text[len(generated)])


if torch.cuda.is_available() and find_spec(SECOND_RUNNERS) is not None:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class SecondForcedText(LogitsProcessor):
        """For the second model runner."""

        def __init__(self, vllm_config, req_states):
            self._prompt_lens = req_states.prompt_len
            self._texts = {}

        def add_request(self, req_idx, sampling_params):
            self._texts[req_idx] = _text_of(sampling_params)
            return self._texts[req_idx] is not None

        def apply(self, logits, ctx):
            for row, (slot, position) in enumerate(
                zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)
            ):
                text = self._texts.get(slot)
                generated = position + 1 - int(self._prompt_lens.np[slot])
                if text is not None and 0 <= generated < len(text):
                    logits[row] = _only(logits[row], text[generated])
            return logits


def processor():
    """The processor for the model runner that vLLM takes."""
    first = not torch.cuda.is_available() or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
    return ForcedText if first else SecondForcedText


def _text_of(params):
    return (params.extra_args or {}).get(FORCED)


def _only(logits, token):
    """Logits [vocab_size] that leave one token."""
    forced = torch.full_like(logits, -torch.inf)
    forced[token] = 0
    return forced
