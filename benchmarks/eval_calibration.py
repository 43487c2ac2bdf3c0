"""KL with and without a calibration file, and of the strongest peer, on texts and at positions not calibrated on."""

import argparse
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from figure_text import nats, percent, table
from results_file import RESULTS, read_result, write_result
from side_by_side.caches import FAMILIES, reference
from side_by_side.calibration import NUM_TOKENS, calibration_file
from side_by_side.weights import file_stem, find_model
from turboquant_core.vector_format import STORAGE_FORMAT
from turboquant_hf._compat import with_cache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.caches import CACHES, NewCache
from turboquant_hf.tools.calibrate.texts import shipped_texts
from turboquant_hf.tools.eval.cache_bytes import bytes_per_token
from turboquant_hf.tools.models import LoadedModel, load_model

PEERS = FAMILIES["quanto, keys by channel"].caches
"""The strongest of those that eval_side_by_side.py compares."""

PRESETS = {"tq4": "quanto 4, keys by channel", "tq3": "quanto 2, keys by channel", "tq2": "quanto 2, keys by channel"}
"""Those that split keys with a file, and the peer of as many bits or fewer."""

CHUNK_SIZE = 128
SHIFT = 6000
LATE = 2048
"""Tokens that are read before those of a long text are scored; a multiple of the peer's groups."""

FIRST_OF_LONG = 1280
"""Of which a fifth is held out."""


@dataclass(frozen=True)
class Case:
    """What is calibrated on, and what is scored.

    Attributes:
        label: For the reader.
        calibrated: The texts to calibrate on.
        text: The text that is scored.
        num_calibrated: Tokens of the former at most.
        num_before: First tokens of the text that are read before any is scored.
        shift: What is added to all positions.
    """

    label: str
    calibrated: tuple[str, ...]
    text: str
    num_calibrated: int = NUM_TOKENS
    num_before: int = 0
    shift: int = 0


def cases() -> dict[str, Case]:
    """All of them, by name."""
    texts, prose = shipped_texts(), next(text for text in shipped_texts() if "harbour" in text)
    code = inspect.getsource(argparse)
    return {
        "encyclopaedia": Case("an encyclopaedia", texts, article()),
        "shifted": Case(f"the same, positions + {SHIFT:,}", texts, article(), shift=SHIFT),
        "code": Case("program code", texts, code),
        "code, prose": Case("program code, calibrated on prose", (prose,), code),
        "late": Case(
            f"tokens from {LATE:,} on of a text, calibrated on its first",
            (article(),),
            article(),
            num_calibrated=FIRST_OF_LONG,
            num_before=LATE,
        ),
    }


@contextmanager
def shifted(model: PreTrainedModel, cache_of_call: str, shift: int) -> Iterator[None]:
    """Have a model read tokens at later positions than a cache would put them."""

    def move(_: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        num_before, num_new = named[cache_of_call].get_seq_length(), named["input_ids"].shape[1]
        positions = torch.arange(num_before, num_before + num_new, device=model.device) + shift
        return arguments, {**named, "position_ids": positions[None]}

    handle = model.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def new_caches(loaded: LoadedModel, case: Case) -> dict[str, NewCache]:
    """Every preset without and with a calibration, and the peers."""
    file = calibration_file(loaded, case.calibrated, case.num_calibrated)
    ours = {preset: CACHES[preset].new for preset in PRESETS}
    calibrated = {f"{preset}, calibrated": partial(ours[preset], key_transforms=file) for preset in PRESETS}
    return {**ours, **calibrated, **PEERS}


def score(loaded: LoadedModel, case: Case, num_tokens: int) -> dict[str, Any]:
    """What every cache gives in a case."""
    model, config = loaded.model, loaded.model.config
    constructors = new_caches(loaded, case)
    uncompressed, caches = reference(config), {name: new_cache(config) for name, new_cache in constructors.items()}
    ids = loaded.tokenizer(case.text, return_tensors="pt")["input_ids"][:, : case.num_before + num_tokens]
    (cache_of_call,) = with_cache(uncompressed).keys() - {"use_cache"}
    with shifted(model, cache_of_call, case.shift), torch.inference_mode():
        if case.num_before:
            # Prefill gives every cache the same keys and values.
            held = DynamicCache()
            model(input_ids=ids[:, : case.num_before], **with_cache(held), logits_to_keep=1)
            for cache in (uncompressed, *caches.values()):
                for index, layer in enumerate(held.layers):
                    cache.update(layer.keys, layer.values, index)
        scores = score_caches(model, ids[:, case.num_before :], uncompressed, caches, chunk_size=CHUNK_SIZE)
        nbytes = {
            name: bytes_per_token(uncompressed, new_cache(config), ids.shape[1])
            for name, new_cache in constructors.items()
        }
    return {
        "label": case.label,
        "num_tokens": num_tokens,
        "caches": {name: {**scores[name].to_dict(), "bytes_per_token": nbytes[name]} for name in caches},
    }


def calibration_table(found: Mapping[str, Any]) -> str:
    """What a calibration gives every preset, beside the peer."""
    columns = (
        "scored",
        "tokens",
        "preset",
        "bytes / token",
        "mean KL",
        "left",
        "top-1",
        "peer: mean KL at bytes / token",
    )
    return table(columns, [_row(case, preset) for case in found.values() for preset in PRESETS])


def _row(case: Mapping[str, Any], preset: str) -> list[str]:
    scores = case["caches"]
    both = before, after = scores[preset], scores[f"{preset}, calibrated"]
    peer = scores[PRESETS[preset]]
    return [
        case["label"],
        f"{after['num_tokens']:,}",
        f"`{preset}`",
        " → ".join(f"{score['bytes_per_token']:,.0f}" for score in both),
        f"{nats(before['mean_kl'])} → **{nats(after['mean_kl'])}**",
        f"{100 * after['mean_kl'] / before['mean_kl']:.0f} %",
        " → ".join(percent(score["top1_agreement"]) for score in both),
        f"{nats(peer['mean_kl'])} at {peer['bytes_per_token']:,.0f}",
    ]


FIGURES = {
    "calibration-64": lambda: calibration_table(read_result("calibration_smollm2")["cases"]),
    "calibration-128": lambda: calibration_table(read_result("calibration_qwen2.5-coder-1.5b")["cases"]),
}


def main() -> None:
    """Score the cases, or one, and write results/calibration_MODEL.json; those that are there already stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--case", choices=list(cases()), action="append")
    parser.add_argument("--num-tokens", type=int, default=640)
    arguments = parser.parse_args()
    name = f"calibration_{file_stem(arguments.model)}"
    found = read_result(name)["cases"] if (RESULTS / f"{name}.json").is_file() else {}
    loaded = load_model(find_model(arguments.model), "cpu")
    for wanted in arguments.case or cases():
        found[wanted] = score(loaded, cases()[wanted], arguments.num_tokens)
        found = {known: found[known] for known in cases() if known in found}
        options = {"model": arguments.model, "storage_format": STORAGE_FORMAT, "chunk_size": CHUNK_SIZE}
        write_result(name, {**options, "cases": found}, device="cpu")
    print(calibration_table(found))


if __name__ == "__main__":
    main()
