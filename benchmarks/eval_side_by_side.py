"""TurboQuantCache beside DynamicCache and QuantizedCache (quanto, hqq, fp8): bytes, KL, speed and lifecycle of each.

Every kind of cache is written to results/side_by_side_MODEL.json when it is done; a run that is called again measures
what is missing there.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from results_file import RESULTS, write_result
from side_by_side.caches import FAMILIES, Family, reference
from side_by_side.calibration import calibration_file
from side_by_side.lifecycle import failure, lifecycle
from side_by_side.speed import tokens_per_second
from side_by_side.table import REFERENCE, markdown
from side_by_side.weights import file_stem, find_model
from turboquant_core.vector_format import STORAGE_FORMAT
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.caches import WINDOW
from turboquant_hf.tools.calibrate.texts import shipped_texts
from turboquant_hf.tools.eval.cache_bytes import bytes_per_token
from turboquant_hf.tools.models import LoadedModel, load_model

# A chunk as long as QuantizedCache's window empties it at each call, as decoding token by token does: the figures are
# the same.
CHUNK_SIZE = WINDOW


def main() -> None:
    """Measure what is missing in the model's results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--num-tokens", type=int, default=1152)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="measure only these")
    arguments = parser.parse_args()
    if arguments.num_tokens % CHUNK_SIZE or arguments.num_tokens < 2 * CHUNK_SIZE:
        parser.error(f"--num-tokens is {arguments.num_tokens}; it must be a multiple of {CHUNK_SIZE}, two or more")
    transformers_logging.set_verbosity_error()

    name = "side_by_side_" + file_stem(arguments.model)
    settings = {
        "storage_format": STORAGE_FORMAT,
        "text": "Encyclopaedia Britannica, 1911, Shakespeare",
        "num_tokens": arguments.num_tokens,
        "chunk_size": CHUNK_SIZE,
        "decode_tokens": arguments.decode_tokens,
    }
    families = _done(name, settings)
    missing = [family for family in arguments.family or FAMILIES if family not in families]
    loaded = load_model(find_model(arguments.model), "cpu") if missing else None
    for family in missing:
        assert loaded is not None
        families[family] = _measure(loaded, FAMILIES[family], arguments.num_tokens, arguments.decode_tokens)
        families = {known: families[known] for known in FAMILIES if known in families}
        write_result(name, {"model": arguments.model, **settings, "families": families}, device="cpu")
    print(markdown({**settings, "families": families}))


def _done(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings measured."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(key) == value for key, value in settings.items())
    return dict(found["families"]) if same else {}


def _measure(loaded: LoadedModel, family: Family, num_tokens: int, decode_tokens: int) -> dict[str, Any]:
    """Everything about the caches of one family, and about DynamicCache measured with them."""
    model, config = loaded.model, loaded.model.config
    input_ids = loaded.tokenizer(article(), return_tensors="pt")["input_ids"][:, :num_tokens]
    constructors, failures = dict(family.caches), {}
    if family.is_calibrated:
        file = calibration_file(loaded, shipped_texts())
        constructors = {name: partial(new_cache, key_transforms=file) for name, new_cache in constructors.items()}
    else:
        # A tiny model, which no file is of, shows them. How split keys fare there is a test of turboquant-hf.
        found = {name: failure(new_cache) for name, new_cache in constructors.items()}
        failures = {name: error for name, error in found.items() if error is not None}
    caches = {name: new_cache(config) for name, new_cache in constructors.items() if name not in failures}
    uncompressed = reference(config)
    scores = score_caches(model, input_ids, uncompressed, caches, chunk_size=CHUNK_SIZE)
    scores[REFERENCE] = scores.pop("reference")
    constructors[REFERENCE] = reference
    with torch.inference_mode():
        num_held = uncompressed.get_seq_length()
        nbytes = {name: bytes_per_token(uncompressed, constructors[name](config), num_held) for name in scores}
    speeds = tokens_per_second(model, {REFERENCE: uncompressed, **caches}, decode_tokens)
    measured = {
        name: {
            **scores[name].to_dict(),
            "bytes_per_token": nbytes[name],
            "tokens_per_second": speeds[name],
            **({"lifecycle": lifecycle(constructors[name])} if name == REFERENCE or not family.is_calibrated else {}),
        }
        for name in (REFERENCE, *caches)
    }
    failed = {name: {"fails": error} for name, error in failures.items()}
    return {"settings": family.settings, "caches": measured | failed}


if __name__ == "__main__":
    main()
