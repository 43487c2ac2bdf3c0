"""KL per token of a row with padding before it, by the number of padded tokens and by who attends."""

import argparse
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from figure_text import nats, table
from results_file import read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import Cache, DynamicCache, with_cache
from turboquant_hf.attending import attending
from turboquant_hf.attention.dispatch import ATTENTION
from turboquant_hf.scoring import kl_divergence
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import load_model

PADDED = (0, 1, 16, 64, 256)
ATTENTIONS = (ATTENTION, "sdpa")


def log_probabilities(
    model: PreTrainedModel, cache: Cache, row: torch.Tensor, prompt_tokens: int, padded: int
) -> torch.Tensor:
    """Of every token after a prompt that has so much padding before it, [num_tokens, vocab_size], read token by token.

    The batch has a second row, which fills the padded places.
    """
    ids = torch.cat([row.new_zeros(padded), row])
    other = row.repeat(-(-len(ids) // len(row)))[: len(ids)]
    batch = torch.stack([ids, other])
    mask = torch.ones_like(batch)
    mask[0, :padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    bounds = [0, padded + prompt_tokens, *range(padded + prompt_tokens + 1, len(ids) + 1)]
    for start, stop in pairwise(bounds):
        logits = model(
            batch[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            **with_cache(cache),
        ).logits
        found.append(logits[0, -1].log_softmax(-1))
    return torch.stack(found[1:])


def kl_table(result: Mapping[str, Any]) -> str:
    """What padding before a row costs it."""
    kl, preset = result["mean_kl"], result["preset"]
    rows = [[f"`{preset}` under `{name}`: KL (nats)", *map(nats, found.values())] for name, found in kl.items()]
    return table(("padded tokens before a row", *map(str, kl[ATTENTION])), rows)


FIGURES = {"left-padding": lambda: kl_table(read_result("left_padding_smollm2"))}


@torch.no_grad()
def main() -> None:
    """Score rows with and without padding, and write results/left_padding_MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--preset", default="tq4")
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--num-tokens", type=int, default=128)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()

    loaded = load_model(find_model(arguments.model), "cpu")
    model, config = loaded.model, loaded.model.config
    row = loaded.tokenizer(article(), return_tensors="pt")["input_ids"][0]
    row = row[: arguments.prompt_tokens + arguments.num_tokens]
    kl: dict[str, dict[int, float]] = {attention: {} for attention in ATTENTIONS}
    for padded in PADDED:
        reference = log_probabilities(model, DynamicCache(config=config), row, arguments.prompt_tokens, padded)
        for attention in ATTENTIONS:
            cache = TurboQuantCache(config, arguments.preset)
            with attending(model, attention):
                candidate = log_probabilities(model, cache, row, arguments.prompt_tokens, padded)
            kl[attention][padded] = float(kl_divergence(reference, candidate).mean())
            print(f"{padded:4d} padded tokens, {attention}: KL {kl[attention][padded]:.4f}", flush=True)
    result = {**vars(arguments), "mean_kl": kl}
    print(kl_table(result))
    print(write_result(f"left_padding_{file_stem(arguments.model)}", result, device="cpu"))


if __name__ == "__main__":
    main()
