"""Measure what is missing, choose bits, and compare them with uniform ones on other text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from turboquant_core import PRESETS, VectorFormat
from turboquant_core.layer_bits import LayerBits
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf._compat import DynamicCache
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.models import LoadedModel
from turboquant_hf.tools.run_files.run_file import RunFile
from turboquant_hf.tools.tune.allocate import allocate
from turboquant_hf.tools.tune.command import CHUNK_SIZE, PROBE_BITS, WIDTHS
from turboquant_hf.tools.tune.results import HeldOut, Sensitivity, layer_unit
from turboquant_hf.tools.tune.sensitivity import (
    GROUP,
    costs,
    layer_shapes,
    measure_sensitivity,
    num_forwards,
)
from turboquant_hf.tools.tune.settings import TuneSettings

TUNED = "tuned"
# Values of fewer bits than keys by more than this were never the best.
MAX_DIFFERENCE = 2

Bits = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Choice:
    """Bits of every layer, and what they give.

    Attributes:
        name: "tuned", a preset, or the key and value bits of every layer.
        bits: Layer index to (key_bits, value_bits).
        token_nbytes: Bytes of codes and scales of a token, all layers.
        predicted_kl: Sum of what the layers cost alone; None where that was not measured.
        held_out: What was measured on the text that they were not chosen on.
    """

    name: str
    bits: Bits
    token_nbytes: int
    predicted_kl: float | None
    held_out: HeldOut

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "bits": self.name,
            "token_nbytes": self.token_nbytes,
            "predicted_kl": self.predicted_kl,
            **self.held_out.to_dict(),
        }


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        target_bits: Bits per coordinate at most.
        tuned: The bits that were chosen.
        uniform: Those of the same size, or the next smaller one, that are alike in every layer; the best first.
    """

    target_bits: float
    tuned: Choice
    uniform: list[Choice]

    @property
    def is_better(self) -> bool:
        """Whether no uniform bits have a smaller KL."""
        return self.tuned.held_out.mean_kl < self.uniform[0].held_out.mean_kl


class Search:
    """A model, a text, and what was measured.

    Args:
        loaded: The model.
        settings: What is measured.
        text: The text.
        target_bits: Bits per coordinate at most, the mean over keys and values of all layers.

    Raises:
        ValueError: If the text or the model's context is too short, or the model has nothing to choose.
    """

    def __init__(self, loaded: LoadedModel, settings: TuneSettings, text: str, target_bits: float) -> None:
        self._loaded = loaded
        self._settings = settings
        self._target_bits = target_bits
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"].to(loaded.model.device)
        _check_lengths(loaded, settings, ids.shape[1])
        self._ids = ids[:, : settings.num_tokens]
        self._held_out_ids = ids[:, settings.num_tokens : settings.num_tokens + settings.held_out_tokens]
        self._shapes = layer_shapes(loaded.model)

    def num_steps(self, run: RunFile) -> int:
        """How often `measure` calls `on_forward`, the comparison with as many uniform bits as there can be included."""
        groups = [2 * len(group) for group, _ in self._missing(run)]
        compared = num_forwards(self._settings.held_out_tokens, 1 + len(self._uniform()))
        return sum(num_forwards(self._settings.num_tokens, caches) for caches in groups) + compared

    def find(self, run: RunFile, on_forward: Callable[[], None] = lambda: None) -> Tuned:
        """Measure what the run lacks, add it, and choose.

        Args:
            run: The run file.
            on_forward: Called after each forward pass.
        """
        for group, bits in self._missing(run):
            found = measure_sensitivity(self._loaded.model, self._ids, group, bits, on_forward)
            for index, sensitivity in found.items():
                run.add(layer_unit(index, bits), _finite(sensitivity.to_dict()))
        tables = self._costs(run)
        flat = [side for pair in tables.values() for side in pair]
        sizes = [shape.bit_nbytes for shape in self._shapes for _ in range(2)]
        chosen = allocate(flat, sizes, math.floor(self._target_bits * sum(sizes)))
        pairs = zip(chosen[::2], chosen[1::2], strict=True)
        tuned: Bits = {shape.index: pair for shape, pair in zip(self._shapes, pairs, strict=True)}
        candidates = {TUNED: tuned, **self._uniform()}
        scores = self._held_out(run, candidates, on_forward)
        choices = [
            Choice(name, bits, self._token_nbytes(bits), _predicted(tables, bits), scores[name])
            for name, bits in candidates.items()
        ]
        return Tuned(self._target_bits, choices[0], sorted(choices[1:], key=lambda choice: choice.held_out.mean_kl))

    def layer_bits(self, found: Tuned) -> LayerBits:
        """The file of what was found."""
        model = self._loaded.model
        return LayerBits(
            layer_bits=found.tuned.bits,
            model=ModelIdentity.of(model.config.get_text_config(decoder=True), type(model).__name__),
            source=self._loaded.name,
            measured={
                "target_bits": found.target_bits,
                **self._settings.to_dict(),
                "held_out": [choice.to_dict() for choice in (found.tuned, *found.uniform)],
            },
        )

    def _missing(self, run: RunFile) -> list[tuple[list[int], int]]:
        """Layers that are to be measured at once, and their bits."""
        groups = []
        for bits in self._settings.probe_bits:
            missing = [shape.index for shape in self._shapes if layer_unit(shape.index, bits) not in run.results]
            groups += [(missing[start : start + GROUP], bits) for start in range(0, len(missing), GROUP)]
        return groups

    def _costs(self, run: RunFile) -> dict[int, tuple[dict[int, float], dict[int, float]]]:
        tables = {}
        for shape in self._shapes:
            measured = {
                bits: Sensitivity.from_dict(run.results[layer_unit(shape.index, bits)])
                for bits in self._settings.probe_bits
            }
            keys = costs({bits: found.keys for bits, found in measured.items()}, shape.head_dim)
            values = costs({bits: found.values for bits, found in measured.items()}, shape.head_dim)
            tables[shape.index] = keys, values
        return tables

    def _uniform(self) -> dict[str, Bits]:
        """The largest bits within the target that are alike in every layer, and the preset of that name if there is."""
        pairs = [
            (keys, values)
            for keys in WIDTHS
            for values in WIDTHS
            if keys + values <= 2 * self._target_bits and 0 <= keys - values <= MAX_DIFFERENCE
        ]
        largest = max(map(sum, pairs))
        named: dict[str, tuple[float, float]] = {
            f"{keys}/{values}": (keys, values) for keys, values in pairs if keys + values == largest
        }
        preset = f"tq{self._target_bits:g}"
        if preset in PRESETS and all(shape.head_dim % 32 == 0 for shape in self._shapes):
            key_bits, value_bits = PRESETS[preset]
            named.setdefault(f"{key_bits:g}/{value_bits:g}", PRESETS[preset])
        return {name: {shape.index: pair for shape in self._shapes} for name, pair in named.items()}

    def _held_out(
        self, run: RunFile, candidates: dict[str, Bits], on_forward: Callable[[], None]
    ) -> dict[str, HeldOut]:
        model = self._loaded.model
        units = {name: _held_out_unit(name, bits) for name, bits in candidates.items()}
        missing = [name for name in candidates if units[name] not in run.results]
        if missing:
            caches = {name: TurboQuantCache(model.config, layer_bits=candidates[name]) for name in missing}
            reference = DynamicCache(config=model.config)
            scores = score_caches(
                model, self._held_out_ids, reference, caches, chunk_size=CHUNK_SIZE, on_forward=on_forward
            )
            for name in missing:
                score = scores[name]
                found = HeldOut(score.mean_kl, score.p99_kl, score.top1_agreement, score.perplexity)
                run.add(units[name], _finite(found.to_dict()))
        return {name: HeldOut.from_dict(run.results[unit]) for name, unit in units.items()}

    def _token_nbytes(self, bits: Bits) -> int:
        return sum(
            shape.num_kv_heads * VectorFormat(shape.head_dim, width).nbytes
            for shape in self._shapes
            for width in bits[shape.index]
        )


def new_settings(
    text_sha256: str, num_tokens: int, held_out_tokens: int, probe_bits: Sequence[int] | None = None
) -> TuneSettings:
    """The settings of a search; see `TuneSettings`."""
    probes = tuple(sorted(set(probe_bits or PROBE_BITS), reverse=True))
    return TuneSettings(text_sha256, num_tokens, held_out_tokens, probes, CHUNK_SIZE)


def _held_out_unit(name: str, bits: Bits) -> str:
    digest = sha256(repr(sorted(bits.items())).encode()).hexdigest()[:16]
    return f"held out/{digest if name == TUNED else name}"


def _predicted(tables: dict[int, tuple[dict[int, float], dict[int, float]]], bits: Bits) -> float | None:
    if any(width not in WIDTHS for pair in bits.values() for width in pair):
        return None
    return sum(
        side[int(width)] for index, pair in bits.items() for side, width in zip(tables[index], pair, strict=True)
    )


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    for name, value in result.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return result


def _check_lengths(loaded: LoadedModel, settings: TuneSettings, text_tokens: int) -> None:
    needed = settings.num_tokens + settings.held_out_tokens
    if text_tokens < needed:
        raise ValueError(
            f"the text has {text_tokens:,} tokens with this tokenizer, and {settings.num_tokens:,} to measure and "
            f"{settings.held_out_tokens:,} to compare on are asked for. Pass --text with a longer one, or fewer "
            "--tokens and --held-out-tokens."
        )
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(settings.num_tokens, settings.held_out_tokens)
    if limit is not None and longest > limit:
        raise ValueError(
            f"{loaded.name} takes {limit:,} tokens, and {longest:,} are asked for. Pass fewer --tokens and "
            "--held-out-tokens."
        )
