"""Score a text with one engine of vLLM in this process, described in JSON, and write the logprobs to a file."""

import json
import os
import sys
from typing import Any

# The model is in this process, where its logits can be seen.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def main() -> None:
    """Read the request and write the logprobs of every next token, float32 [num_tokens - 1, vocabulary]."""
    request, answer = json.loads(sys.argv[1]), sys.argv[2]
    tokens = request["tokens"]
    llm = LLM(
        request["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(tokens) + 16,
        max_num_seqs=1,
        max_num_batched_tokens=request["chunk_size"],
        **request["engine"],
    )
    rows: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        # One row alone is the token that would come after a chunk, which is among the next call's.
        if len(logits) > 1:
            rows.append(logits.float().log_softmax(-1).cpu())

    llm.apply_model(lambda model: model.logits_processor.register_forward_hook(keep) and None)
    # vLLM computes the logits of a prompt where it is asked for their logprobs.
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    llm.generate([TokensPrompt(prompt_token_ids=tokens)], sampling, use_tqdm=False)
    logprobs = torch.cat(rows)
    assert len(logprobs) == len(tokens) - 1, (len(logprobs), len(tokens))
    save_file({"logprobs": logprobs}, answer)


if __name__ == "__main__":
    main()
