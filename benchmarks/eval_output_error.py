"""KL of bits of layers that were chosen by the error of each layer's attention output, beside uniform bits."""

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import DynamicCache

from figure_text import nats, table
from results_file import read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.eval.layer_errors import layer_errors
from turboquant_hf.tools.models import load_model
from turboquant_hf.tools.tune.allocate import allocate
from turboquant_hf.tools.tune.command import CHUNK_SIZE, WIDTHS
from turboquant_hf.tools.tune.sensitivity import FINEST_BITS, layer_shapes

# At each target, the uniform bits of the same size.
UNIFORM = {3.0: (3, 3), 3.5: (4, 3), 4.0: (4, 4)}


def targets_table(targets: Iterable[Mapping[str, Any]]) -> str:
    """Chosen bits beside uniform ones."""
    rows = [
        [
            f"{row['target_bits']:g}",
            nats(row["mean_kl"]),
            "{} ({}/{})".format(nats(row["uniform_mean_kl"]), *row["uniform_bits"]),
        ]
        for row in targets
    ]
    return table(("target", "chosen by output error: KL (nats)", "uniform: KL (bits)"), rows)


FIGURES = {"output-error": lambda: targets_table(read_result("output_error_smollm2")["targets"])}


def main() -> None:
    """Choose, score on held-out text and write results/output_error_MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--held-out-tokens", type=int, default=1536)
    arguments = parser.parse_args()

    loaded = load_model(find_model(arguments.model), "cpu")
    ids = loaded.tokenizer(article(), return_tensors="pt")["input_ids"]
    first, rest = arguments.num_tokens, arguments.num_tokens + arguments.held_out_tokens
    pairs = {f"keys {bits}": (bits, FINEST_BITS) for bits in WIDTHS}
    pairs |= {f"values {bits}": (FINEST_BITS, bits) for bits in WIDTHS}
    errors = layer_errors(loaded.model, ids[:, :first], pairs)
    shapes = layer_shapes(loaded.model)
    costs = [
        {bits: errors[f"{side} {bits}"][number].output_error for bits in WIDTHS}
        for number in range(len(shapes))
        for side in ("keys", "values")
    ]
    sizes = [shape.bit_nbytes for shape in shapes for _ in range(2)]
    chosen, caches = {}, {}
    for target, pair in UNIFORM.items():
        bits = allocate(costs, sizes, math.floor(target * sum(sizes)))
        by_layer = zip(shapes, zip(bits[::2], bits[1::2], strict=True), strict=True)
        chosen[target] = {shape.index: of_layer for shape, of_layer in by_layer}
        caches[f"chosen {target:g}"] = TurboQuantCache(loaded.model.config, layer_bits=chosen[target])
        caches[f"uniform {target:g}"] = TurboQuantCache(loaded.model.config, key_bits=pair[0], value_bits=pair[1])
    reference = DynamicCache(config=loaded.model.config)
    scores = score_caches(loaded.model, ids[:, first:rest], reference, caches, chunk_size=CHUNK_SIZE)
    rows = [
        {
            "target_bits": target,
            "uniform_bits": pair,
            "mean_kl": scores[f"chosen {target:g}"].mean_kl,
            "uniform_mean_kl": scores[f"uniform {target:g}"].mean_kl,
            "layer_bits": chosen[target],
        }
        for target, pair in UNIFORM.items()
    ]
    data = {
        "model": loaded.name,
        "text": "Encyclopaedia Britannica, 1911, Shakespeare",
        "num_tokens": arguments.num_tokens,
        "held_out_tokens": arguments.held_out_tokens,
        "targets": rows,
    }
    print(targets_table(rows))
    print(write_result(f"output_error_{file_stem(arguments.model)}", data, device="cpu"))


if __name__ == "__main__":
    main()
