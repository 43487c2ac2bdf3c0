"""KL per token of every preset and option of TurboQuantCache on real weights; the defaults follow from it."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from rich.progress import Progress
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

from figure_text import bold_if, nats, table
from results_file import read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import load_model

SCALES = (
    ("norm", "norm"),
    ("norm", "least_squares"),
    ("unbiased", "norm"),
    ("least_squares", "norm"),
    ("least_squares", "least_squares"),
)


KEPT_TOKENS = ((0, 0), (1, 0), (4, 0), (1, 4), (1, 8), (1, 16), (1, 32), (4, 16))
CODES_ONLY = {"sink_tokens": 0, "recent_tokens": 0}


def with_window(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """A Llama's weights whose tokens see a window: but for that a Mistral is the same."""
    fields = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    windowed = MistralForCausalLM(MistralConfig(**{**fields, "sliding_window": window})).eval()
    windowed.load_state_dict(model.state_dict())
    return windowed


def kept_tokens(numbers: Iterable[tuple[int, int]] = KEPT_TOKENS) -> dict[str, dict[str, Any]]:
    """Numbers of sinks and of recent tokens."""
    return {
        f"{preset}, sink_tokens={sinks}, recent_tokens={recent}": {
            "preset": preset,
            "sink_tokens": sinks,
            "recent_tokens": recent,
        }
        for preset in ("tq4", "tq2")
        for sinks, recent in numbers
    }


def options() -> dict[str, dict[str, Any]]:
    """Variants of codes, none of which has tokens in full precision beside it. A preset's name alone is its default."""
    variants: dict[str, dict[str, Any]] = {
        f"{preset}, key scale {key_scale}, value scale {value_scale}": {
            "preset": preset,
            "key_scale": key_scale,
            "value_scale": value_scale,
        }
        for preset in ("tq4", "tq3", "tq2")
        for key_scale, value_scale in SCALES
    }
    for preset in ("tq4", "tq3.5", "tq3", "tq2.5", "tq2", "k6v4", "k8v4"):
        variants[preset] = {"preset": preset}
    for preset in ("tq4", "tq3", "tq2", "k6v4"):
        variants[f"{preset}, not centred"] = {"preset": preset, "center_keys": False}
    return {name: {**CODES_ONLY, **variant} for name, variant in variants.items()}


def scale_table(scores: Mapping[str, Any]) -> str:
    """Rules for the stored scale of keys and values, and keys that are not centred."""
    rules = [(keys, values) for keys in ("norm", "unbiased", "least_squares") for values in ("norm", "least_squares")]
    widths = ("tq4", "tq3", "tq2")
    rows = []
    for keys, values in rules:
        is_default = (keys, values) not in SCALES
        names = [width if is_default else f"{width}, key scale {keys}, value scale {values}" for width in widths]
        label = f"{keys}, {values}".replace("_", " ")
        cells = [label, *(nats(scores[name]["mean_kl"]) for name in names)]
        rows.append([bold_if(is_default, cell) for cell in cells])
        rows[-1][0] += " (default)" if is_default else ""
    rows.append(["default, keys not centred", *(nats(scores[f"{width}, not centred"]["mean_kl"]) for width in widths)])
    return table(("keys, values", *(f"`{width}`" for width in widths)), rows)


def kept_table(scores: Mapping[str, Any]) -> str:
    """Numbers of first and newest tokens that are kept, at 4 and at 2 bits."""
    rows = []
    for name in scores:
        preset, *kept = name.split(", ")
        if preset == "tq4":
            sinks, recent = (number.partition("=")[2] for number in kept)
            cells = [sinks, recent, *(nats(scores[", ".join([width, *kept])]["mean_kl"]) for width in ("tq4", "tq2"))]
            rows.append([bold_if((sinks, recent) == ("1", "8"), cell) for cell in cells])
    return table(("`sink_tokens`", "`recent_tokens`", "`tq4`: KL (nats)", "`tq2`: KL (nats)"), rows)


FIGURES = {
    "scale-rules": lambda: scale_table(read_result("cache_options")["scores"]),
    "kept-tokens": lambda: kept_table(read_result("kept_tokens_smollm2")["scores"]),
    "kept-tokens-window": lambda: kept_table(read_result("kept_tokens_window_smollm2")["scores"]),
}


def main() -> None:
    """Score all variants and write results/cache_options.json, with --kept results/kept_tokens[_window]_MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--kept", action="store_true", help="numbers of sinks and recent tokens")
    parser.add_argument("--window", type=int, help="with --kept, defaults and codes only, where tokens see a window")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--num-tokens", type=int, default=3072)
    arguments = parser.parse_args()

    if arguments.window and not arguments.kept:
        parser.error("--window needs --kept")

    loaded = load_model(find_model(arguments.model), "cpu")
    model = with_window(loaded.model, arguments.window) if arguments.window else loaded.model
    encoded = loaded.tokenizer(article(), return_tensors="pt")
    input_ids = encoded["input_ids"][:, : arguments.num_tokens]
    config = model.config
    numbers = ((0, 0), (1, 8)) if arguments.window else KEPT_TOKENS
    variants = kept_tokens(numbers) if arguments.kept else options()
    caches = {name: TurboQuantCache(config, **kwargs) for name, kwargs in variants.items()}
    num_forwards = -(-input_ids.shape[1] // arguments.chunk_size) * (len(caches) + 1)
    with Progress() as progress:
        task = progress.add_task("scoring", total=num_forwards)
        scores = score_caches(
            model,
            input_ids,
            DynamicCache(config=config),
            caches,
            chunk_size=arguments.chunk_size,
            on_forward=lambda: progress.advance(task),
        )
    rows = {
        name: {
            **score.to_dict(),
            **({"nbytes": caches[name].nbytes} if name in caches else {}),
        }
        for name, score in scores.items()
    }
    for name, row in rows.items():
        print(f"{name:58s} KL {row['mean_kl']:.4f}  top-1 {row['top1_agreement']:.3f}")
    kind = "kept_tokens_window" if arguments.window else "kept_tokens"
    path = write_result(
        f"{kind}_{file_stem(arguments.model)}" if arguments.kept else "cache_options",
        {
            "model": loaded.name,
            **({"window": arguments.window} if arguments.window else {}),
            "text": "Encyclopaedia Britannica, 1911, Shakespeare",
            "num_tokens": input_ids.shape[1],
            "chunk_size": arguments.chunk_size,
            "scores": rows,
        },
        device="cpu",
    )
    print(path)


if __name__ == "__main__":
    main()
