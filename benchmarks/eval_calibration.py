"""KL with and without a calibration file, on texts and at positions that the calibration did not see."""

import argparse
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from figure_text import nats, percent, table
from results_file import RESULTS, read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_core.calibration import write_calibration
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import with_cache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.calibrate.measure import measure
from turboquant_hf.tools.calibrate.texts import shipped_texts, split_tokens
from turboquant_hf.tools.models import LoadedModel, load_model

PRESETS = ("tq4", "tq3", "tq2")
CHUNK_SIZE = 128
SHIFT = 6000
LATE = 2000
"""Tokens that are read before those of a long text are scored."""

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
    num_calibrated: int = 4096
    num_before: int = 0
    shift: int = 0


def cases() -> dict[str, Case]:
    """All of them, by name."""
    texts, prose = shipped_texts(), next(text for text in shipped_texts() if "harbour" in text)
    code = inspect.getsource(argparse)
    return {
        "encyclopaedia": Case("an encyclopaedia", texts, article()),
        "shifted": Case(f"the same, positions + {SHIFT:,}", texts, article(), shift=SHIFT),
        "code": Case("program code, calibrated on prose", (prose,), code),
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


def score(loaded: LoadedModel, case: Case, num_tokens: int) -> dict[str, Any]:
    """KL of every preset without and with a calibration."""
    model, config = loaded.model, loaded.model.config

    def encode(text: str) -> torch.Tensor:
        ids: torch.Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids

    measured, held_out = split_tokens([encode(text)[0] for text in case.calibrated], case.num_calibrated)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibration.safetensors")
        write_calibration(path, measure(loaded, measured, held_out).calibration)
        caches: dict[str, Cache] = {preset: TurboQuantCache(config, preset) for preset in PRESETS}
        caches |= {f"{preset}, calibrated": TurboQuantCache(config, preset, key_transforms=path) for preset in PRESETS}
    reference = DynamicCache(config=config)
    ids = encode(case.text)[:, : case.num_before + num_tokens]
    (cache_of_call,) = with_cache(reference).keys() - {"use_cache"}
    with shifted(model, cache_of_call, case.shift), torch.inference_mode():
        if case.num_before:
            for cache in (reference, *caches.values()):
                model(input_ids=ids[:, : case.num_before], **with_cache(cache), logits_to_keep=1)
        scores = score_caches(model, ids[:, case.num_before :], reference, caches, chunk_size=CHUNK_SIZE)
    return {
        "label": case.label,
        "num_measured": measured.shape[1],
        "scores": {name: scores[name].to_dict() for name in caches},
        "nbytes": {name: cache.nbytes for name, cache in caches.items()},
    }


def calibration_table(found: Mapping[str, Any]) -> str:
    """What a calibration leaves of the KL of every preset."""
    rows = []
    for case in found.values():
        cells = [case["label"]]
        for preset in PRESETS:
            before, after = (case["scores"][name]["mean_kl"] for name in (preset, f"{preset}, calibrated"))
            cells.append(f"{nats(before)} → **{nats(after)}** ({percent(after / before)})")
        rows.append(cells)
    return table(("scored", *(f"`{preset}`" for preset in PRESETS)), rows)


FIGURES = {
    "calibration": lambda: calibration_table(read_result("calibration_smollm2")["cases"]),
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
        options = {"model": loaded.name, "num_tokens": arguments.num_tokens, "chunk_size": CHUNK_SIZE}
        write_result(name, {**options, "cases": found}, device="cpu")
    print(calibration_table(found))


if __name__ == "__main__":
    main()
