"""Perplexity and KL of a preset with keys centred and not, on more text than the side-by-side comparison scores."""

import argparse

from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from results_file import write_result
from side_by_side.weights import file_stem, find_model
from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import load_model


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
    expected = scores["reference"].perplexity
    for name, score in scores.items():
        change = score.perplexity / expected - 1
        print(f"{name:12s} perplexity {score.perplexity:.4f} ({change:+.2%})  KL {score.mean_kl:.4f}")
    name = "centring_" + file_stem(arguments.model)
    write_result(
        name, {**vars(arguments), "scores": {name: score.to_dict() for name, score in scores.items()}}, device="cpu"
    )


if __name__ == "__main__":
    main()
