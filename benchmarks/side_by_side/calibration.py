"""Calibration files, as `turboquant calibrate` makes them."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from turboquant_core.calibration import write_calibration
from turboquant_hf.tools.calibrate.measure import measure
from turboquant_hf.tools.calibrate.texts import split_tokens
from turboquant_hf.tools.models import LoadedModel

NUM_TOKENS = 4096
"""Tokens that the command takes at most by default; a fifth of them is held out."""


@cache
def calibration_file(loaded: LoadedModel, texts: Iterable[str], num_tokens: int = NUM_TOKENS) -> Path:
    """A file for a model, measured on that many tokens of the texts at most; it lasts as long as the process."""
    encoded = [loaded.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    path = Path(_folder().name, f"{len(list(Path(_folder().name).iterdir()))}.safetensors")
    write_calibration(path, measure(loaded, *split_tokens(encoded, num_tokens)).calibration)
    return path


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory()
