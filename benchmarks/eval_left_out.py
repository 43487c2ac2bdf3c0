"""KL per token of what TurboQuantCache leaves out: the paper's Prod for keys, and values less their mean."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from figure_text import nats, table
from results_file import read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_core import MSEQuantizer, ProdQuantizer
from turboquant_hf._compat import Cache, DynamicCache, DynamicLayer
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import load_model

WIDTHS = (4, 3, 2)


@dataclass(frozen=True)
class Variant:
    """How keys and values are quantised; otherwise as `TurboQuantCache` does without tokens kept as they are.

    Attributes:
        bits: Of keys and of values.
        prod_keys: Keys by `ProdQuantizer`, the sketch's bit included in `bits`.
        center_values: Subtract the mean of the first call's values, as from keys.
    """

    bits: int
    prod_keys: bool = False
    center_values: bool = False


class RoundTripLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer that holds in full precision what codes would say: what they do to a model, and not to memory."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what codes say; the first call attends on its own tokens as they are."""
        is_first = self.get_seq_length() == 0
        if is_first:
            self.key_mean = key_states.mean(2, keepdim=True)
            self.value_mean = value_states.mean(2, keepdim=True) if self.variant.center_values else 0.0
        head_dim, bits = key_states.shape[-1], self.variant.bits
        of_keys = ProdQuantizer(head_dim, bits) if self.variant.prod_keys else MSEQuantizer(head_dim, bits, "unbiased")
        of_values = MSEQuantizer(head_dim, bits, "least_squares")
        keys = self.key_mean + of_keys.dequantize(of_keys.quantize(key_states - self.key_mean))
        values = self.value_mean + of_values.dequantize(of_values.quantize(value_states - self.value_mean))
        read = super().update(keys, values)
        return (key_states, value_states) if is_first else read


def variants() -> dict[str, Variant]:
    """Every variant by name; a width's name alone is the codes of `TurboQuantCache`."""
    found = {}
    for bits in WIDTHS:
        found[f"tq{bits}"] = Variant(bits)
        found[f"tq{bits}, keys by Prod"] = Variant(bits, prod_keys=True)
        found[f"tq{bits}, values centred"] = Variant(bits, center_values=True)
    return found


def scores_table(scores: Mapping[str, Any]) -> str:
    """What is left out, beside what is not."""
    kinds = {"keys by `Prod`": ", keys by Prod", "values centred": ", values centred", "**neither** (default)": ""}
    names = [f"tq{bits}" for bits in WIDTHS]
    rows = [[label, *(nats(scores[f"{name}{kind}"]["mean_kl"]) for name in names)] for label, kind in kinds.items()]
    return table(("", *(f"`{name}`" for name in names)), rows)


FIGURES = {"left-out": lambda: scores_table(read_result("left_out_smollm2")["scores"])}


def main() -> None:
    """Score all variants and write results/left_out_MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--num-tokens", type=int, default=3072)
    arguments = parser.parse_args()

    loaded = load_model(find_model(arguments.model), "cpu")
    config = loaded.model.config
    input_ids = loaded.tokenizer(article(), return_tensors="pt")["input_ids"][:, : arguments.num_tokens]
    caches = {
        name: Cache(layers=[RoundTripLayer(variant) for _ in range(config.num_hidden_layers)])
        for name, variant in variants().items()
    }
    reference = DynamicCache(config=config)
    scores = score_caches(loaded.model, input_ids, reference, caches, chunk_size=arguments.chunk_size)
    found = {name: score.to_dict() for name, score in scores.items()}
    print(scores_table(found))
    print(write_result(f"left_out_{file_stem(arguments.model)}", {**vars(arguments), "scores": found}, device="cpu"))


if __name__ == "__main__":
    main()
