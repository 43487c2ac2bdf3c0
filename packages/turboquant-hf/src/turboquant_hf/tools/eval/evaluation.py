"""Measure what is missing in a run file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from turboquant_core.command_output import not_finite
from turboquant_core.config import preset_bits
from turboquant_hf._compat import Cache, with_cache
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.caches import CACHES, UNCOMPRESSED, WINDOW
from turboquant_hf.tools.eval.cache_bytes import bytes_per_token
from turboquant_hf.tools.eval.greedy import PROMPT_TOKENS, continuations, greedy_prompts
from turboquant_hf.tools.eval.layer_errors import layer_errors
from turboquant_hf.tools.eval.needle import NeedlePrompt, find_needle, needle_prompt
from turboquant_hf.tools.eval.results import Failure, Greedy
from turboquant_hf.tools.eval.settings import EvalSettings
from turboquant_hf.tools.eval.speed import decoding_speed
from turboquant_hf.tools.eval.units import CHECK, Unit, all_units, missing_units, served_caches
from turboquant_hf.tools.models import LoadedModel
from turboquant_hf.tools.run_files.run_file import RunFile

CHECK_TOKENS = 64


class Evaluation:
    """A model, a text, and what is to be measured.

    Args:
        loaded: The model.
        settings: What is measured.
        text: The text.
        calibration: The file of `turboquant calibrate` that our caches are made with, or None.

    Raises:
        ValueError: If the text is too short, the model's context is, a needle does not fit, or a cache cannot be made
            with the file.
    """

    def __init__(self, loaded: LoadedModel, settings: EvalSettings, text: str, calibration: Path | None = None) -> None:
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._settings = settings
        self._calibration = calibration
        self._text_ids: torch.Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"][0]
        _check_lengths(loaded, settings, len(self._text_ids))
        for name in settings.caches if calibration else ():
            self._new(name)
        for unit in all_units(settings):
            if unit.measurement == "needle":
                self._needle(unit)

    def measure_missing(
        self, run: RunFile, before: Callable[[Unit], None] = lambda unit: None, after: Callable[[], None] = lambda: None
    ) -> None:
        """Measure every unit that has no result yet, and add it to the run.

        Args:
            run: The run file.
            before: Called with each unit before it is measured.
            after: Called after each.
        """
        while missing := missing_units(self._settings, run.results):
            before(missing[0])
            run.add(missing[0].name, _finite(self._measure(missing[0], run)))
            after()

    def _measure(self, unit: Unit, run: RunFile) -> dict[str, Any]:
        if unit.cache is None:
            return {"caches": self._needles(self._needle(unit), served_caches(self._settings, run.results))}
        measures: dict[str, Callable[[str], dict[str, Any]]] = {
            CHECK: self._check,
            "quality": self._quality,
            "layers": self._layers,
            "greedy": self._greedy,
            "speed": self._speed,
        }
        return _or_failure(unit.cache, lambda name: measures[unit.measurement](name))

    def _check(self, name: str) -> dict[str, Any]:
        """Prefill, empty the window that a cache may have, and read what it was emptied into."""
        cache = self._new(name)
        ids = self._ids(WINDOW + 2 * CHECK_TOKENS)
        with torch.no_grad():
            for chunk in torch.split(ids, [CHECK_TOKENS, WINDOW, CHECK_TOKENS], dim=1):
                logits = self._model(input_ids=chunk, **with_cache(cache)).logits
        return {} if logits.isfinite().all() else Failure("its logits are not finite").to_dict()

    def _needles(self, prompt: NeedlePrompt, names: list[str]) -> dict[str, Any]:
        """What each cache finds, with one prefill for all if none fails."""

        def find(*names: str) -> dict[str, Any]:
            found = find_needle(self._model, prompt, {name: self._new(name) for name in names})
            return {name: score.to_dict() for name, score in found.items()}

        peers = [name for name in names if CACHES[name].is_peer]
        try:
            return find(*names)
        except Exception as error:
            if not peers or isinstance(error, torch.OutOfMemoryError):
                raise
        alone = {name: _or_failure(name, find) for name in peers}
        return find(*(name for name in names if name not in peers)) | {
            name: result.get(name, result) for name, result in alone.items()
        }

    def _quality(self, name: str) -> dict[str, Any]:
        reference = self._new(UNCOMPRESSED)
        candidates = {} if name == UNCOMPRESSED else {name: self._new(name)}
        chunk_size = self._settings.chunk_size
        ids = self._ids(self._settings.num_tokens)
        scores = score_caches(self._model, ids, reference, candidates, chunk_size=chunk_size)
        score = scores.get(name, scores["reference"])
        nbytes = bytes_per_token(reference, self._new(name), ids.shape[1])
        return {**score.to_dict(), "bytes_per_token": nbytes}

    def _layers(self, name: str) -> dict[str, Any]:
        layers = enumerate(self._new(name).layers)
        given = {index: layer.key_transform for index, layer in layers if isinstance(layer, TurboQuantLayer)}
        errors = layer_errors(self._model, self._ids(self._settings.layer_tokens), {name: preset_bits(name)}, given)
        return {"layers": [error.to_dict() for error in errors[name]]}

    def _greedy(self, name: str) -> dict[str, Any]:
        prompts = greedy_prompts(self._text_ids)
        return Greedy(continuations(self._model, prompts, self._new(name), self._settings.greedy_tokens)).to_dict()

    def _speed(self, name: str) -> dict[str, Any]:
        # Without a kernel for the codes, reading them one by one is no faster than dequantising them.
        on_codes = CACHES[name].is_ours and self._model.device.type == "cuda"
        ids = self._ids(self._settings.num_tokens)
        speed = decoding_speed(self._model, ids, self._new(name), self._new(UNCOMPRESSED), on_codes=on_codes)
        return speed.to_dict()

    def _needle(self, unit: Unit) -> NeedlePrompt:
        return needle_prompt(self._tokenizer, self._text_ids, unit.length, unit.depth, self._settings.seed)

    def _new(self, name: str) -> Cache:
        return CACHES[name].calibrated(self._model.config, self._calibration)

    def _ids(self, num_tokens: int) -> torch.Tensor:
        """The first tokens of the text, int64 [1, num_tokens]."""
        return self._text_ids[None, :num_tokens].to(self._model.device)


def _or_failure(name: str, measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What is measured of a cache; whatever a cache of another project raises is its result."""
    try:
        return measure(name)
    except Exception as error:
        if not CACHES[name].is_peer or isinstance(error, torch.OutOfMemoryError):
            raise
        return Failure(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}").to_dict()


def _check_lengths(loaded: LoadedModel, settings: EvalSettings, text_tokens: int) -> None:
    needed = max(settings.num_tokens, settings.layer_tokens, PROMPT_TOKENS, WINDOW + 2 * CHECK_TOKENS)
    if text_tokens < needed:
        raise ValueError(
            f"the text has {text_tokens:,} tokens with this tokenizer, and {needed:,} are to be read. Pass --text with "
            "a longer one, or fewer --tokens."
        )
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(needed, *settings.needle_lengths, PROMPT_TOKENS + settings.greedy_tokens)
    if limit is not None and longest > limit:
        raise ValueError(
            f"{loaded.name} takes {limit:,} tokens, and {longest:,} are asked for. Pass fewer --tokens, or a smaller "
            "--needle-length or --greedy-tokens."
        )


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """The result, or that it is none because numbers in it are none."""
    bad = next(not_finite(result), None)
    return result if bad is None else Failure(bad).to_dict()
