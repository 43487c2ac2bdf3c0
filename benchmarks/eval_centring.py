"""Perplexity and KL of a preset with keys centred and not, on more text than the side-by-side comparison scores."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from figure_text import nats, table
from results_file import read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import load_model


def scores_table(result: Mapping[str, Any]) -> str:
    """What centring does to a model."""
    scores, preset = result["scores"], result["preset"]
    labels = {"centred": f"`{preset}`, keys centred (default)", "not centred": f"`{preset}`, not centred"}
    rows = [["uncompressed", f"{scores['reference']['perplexity']:.3f}", "", ""]]
    for name, label in labels.items():
        score = scores[name]
        perplexity = f"{score['perplexity']:.3f}" if score["perplexity"] < 100 else f"{score['perplexity']:,.0f}"
        rows.append([label, perplexity, f"{increase(result, name)} %", nats(score["mean_kl"])])
    return table(("cache", "perplexity", "against uncompressed", "mean KL"), rows)


def increase(result: Mapping[str, Any], keys: str) -> str:
    """How many per cent higher the perplexity is with keys "centred" or not."""
    scores = result["scores"]
    higher = 100 * (scores[keys]["perplexity"] / scores["reference"]["perplexity"] - 1)
    return f"{higher:+.2f}" if higher < 100 else f"{higher:+,.0f}"


def _of_qwen() -> Any:
    return read_result("centring_qwen2.5-coder-1.5b")


FIGURES: dict[str, Callable[[], str]] = {
    "centring": lambda: scores_table(_of_qwen()),
    "qwen-ppl": lambda: increase(_of_qwen(), "centred"),
    "qwen-ppl-plain": lambda: increase(_of_qwen(), "not centred"),
}


def main() -> None:
    """Score the uncompressed cache and both variants, and write results/centring_MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--preset", default="tq4")
    parser.add_argument("--num-tokens", type=int, default=1152)
    parser.add_argument("--chunk-size", type=int, default=128)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()

    loaded = load_model(find_model(arguments.model), "cpu")
    config = loaded.model.config
    scores = score_caches(
        loaded.model,
        loaded.tokenizer(article(), return_tensors="pt")["input_ids"][:, : arguments.num_tokens],
        DynamicCache(config=config),
        {
            "centred": TurboQuantCache(config, arguments.preset),
            "not centred": TurboQuantCache(config, arguments.preset, center_keys=False),
        },
        chunk_size=arguments.chunk_size,
    )
    result = {**vars(arguments), "scores": {name: score.to_dict() for name, score in scores.items()}}
    print(scores_table(result))
    print(write_result("centring_" + file_stem(arguments.model), result, device="cpu"))


if __name__ == "__main__":
    main()
