"""The results of a run file, cache by cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turboquant_hf.tools.caches import CACHES, UNCOMPRESSED, NamedCache
from turboquant_hf.tools.eval.greedy import shared_length
from turboquant_hf.tools.eval.results import LayerError, NeedleScore, Quality, Speed
from turboquant_hf.tools.eval.settings import EvalSettings
from turboquant_hf.tools.eval.units import Unit, all_units, check_result, missing_units
from turboquant_hf.tools.run_files.run_file import RunFile

GOOD_KL = 0.05
"""Mean KL up to which a cache is proposed: where SmolLM2 puts nine of ten tokens first as without it."""


@dataclass
class CacheSummary:
    """What one cache does; what was not measured is None or empty.

    Attributes:
        cache: The cache.
        fails: Why it has no results.
        quality: Next-token distributions and bytes.
        compression: Bytes of the uncompressed cache over this one's.
        layers: Errors of each layer.
        needles: (length, depth) to what came of the needle.
        greedy: Tokens of each continuation before it leaves the uncompressed one's.
        speed: Decoding speed.
    """

    cache: NamedCache
    fails: str | None = None
    quality: Quality | None = None
    compression: float | None = None
    layers: list[LayerError] = field(default_factory=list)
    needles: dict[tuple[int, float], NeedleScore] = field(default_factory=dict)
    greedy: list[int] = field(default_factory=list)
    speed: Speed | None = None

    @property
    def mean_greedy(self) -> float | None:
        """Mean of `greedy`."""
        return sum(self.greedy) / len(self.greedy) if self.greedy else None

    @property
    def needle_share(self) -> float | None:
        """Mean share of the answers that are right."""
        shares = [score.share for score in self.needles.values()]
        return sum(shares) / len(shares) if shares else None

    @property
    def needles_found(self) -> int:
        """Needles whose answers are right as a whole."""
        return sum(score.found for score in self.needles.values())

    @property
    def speed_ratio(self) -> float | None:
        """Decoding speed over that of the uncompressed cache."""
        return None if self.speed is None else self.speed.tokens_per_second / self.speed.reference_tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "cache": self.cache.name,
            "settings": self.cache.made_with,
            "fails": self.fails,
            **(self.quality.to_dict() if self.quality else {}),
            "compression": self.compression,
            "needle_share": self.needle_share,
            "needles_found": self.needles_found if self.needles else None,
            "greedy_tokens_shared": self.greedy,
            "tokens_per_second": self.speed.tokens_per_second if self.speed else None,
            "speed_ratio": self.speed_ratio,
        }


@dataclass(frozen=True)
class RunSummary:
    """What one run found.

    Attributes:
        run: The run file.
        settings: What was to be measured.
        caches: The caches, the uncompressed one first.
        num_missing: Units that have no result yet.
    """

    run: RunFile
    settings: EvalSettings
    caches: list[CacheSummary]
    num_missing: int

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.run.header["model"]["name"])

    @property
    def device(self) -> str:
        """What it ran on."""
        return str(self.run.header["environment"]["device"])

    @property
    def dtype(self) -> str:
        """Type of weights and arithmetic."""
        return str(self.run.header["model"]["dtype"])

    @property
    def smallest_good(self) -> CacheSummary | None:
        """The smallest of our caches whose mean KL is at most `GOOD_KL`; None if there is none."""
        good = [
            (cache.quality.bytes_per_token, cache)
            for cache in self.caches
            if cache.cache.is_ours and cache.quality is not None and cache.quality.mean_kl <= GOOD_KL
        ]
        return min(good, key=lambda pair: pair[0])[1] if good else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        header = {key: self.run.header[key] for key in ("model", "environment", "settings")}
        return {**header, "units_missing": self.num_missing, "caches": [cache.to_dict() for cache in self.caches]}


def summarise(run: RunFile) -> RunSummary:
    """The results of a run.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        settings = EvalSettings.from_dict(run.header["settings"])
        _check(run, settings)
        caches = {name: CacheSummary(CACHES[name]) for name in (UNCOMPRESSED, *settings.caches)}
        for unit in all_units(settings):
            if unit.name in run.results:
                check_result(unit, run.results[unit.name], settings)
                _put(unit, run.results, caches)
    except ValueError as error:
        raise ValueError(f"{run.path} is a damaged run file: {error}") from None
    plain = caches[UNCOMPRESSED].quality
    for cache in caches.values():
        if plain is not None and cache.quality is not None:
            cache.compression = plain.bytes_per_token / cache.quality.bytes_per_token
    return RunSummary(run, settings, list(caches.values()), len(missing_units(settings, run.results)))


def _check(run: RunFile, settings: EvalSettings) -> None:
    for section, key in (("model", "name"), ("model", "dtype"), ("environment", "device")):
        if not isinstance(run.header[section].get(key), str):
            raise ValueError(f"its section {section!r} has no {key}")
    if unknown := [name for name in settings.caches if name not in CACHES]:
        raise ValueError(f"there is no cache {unknown[0]!r}")
    if unknown := sorted(run.results.keys() - {unit.name for unit in all_units(settings)}):
        raise ValueError(f"its settings know of no {unknown[0]}")


def _put(unit: Unit, results: Mapping[str, Any], caches: Mapping[str, CacheSummary]) -> None:
    """Put the result of a unit where it belongs."""
    result = results[unit.name]
    if unit.cache is None:
        for name, score in result["caches"].items():
            if "fails" in score:
                caches[name].fails = caches[name].fails or score["fails"]
            else:
                caches[name].needles[unit.length, unit.depth] = NeedleScore.from_dict(score)
        return
    cache = caches[unit.cache]
    if "fails" in result:
        cache.fails = cache.fails or result["fails"]
    elif unit.measurement == "quality":
        cache.quality = Quality.from_dict(result)
    elif unit.measurement == "layers":
        cache.layers = [LayerError.from_dict(layer) for layer in result["layers"]]
    elif unit.measurement == "speed":
        cache.speed = Speed.from_dict(result)
    elif unit.measurement == "greedy":
        expected = results.get(f"greedy/{UNCOMPRESSED}", {}).get("tokens", [])
        if [len(tokens) for tokens in expected] != [len(tokens) for tokens in result["tokens"]]:
            raise ValueError(f"{unit.name} has other lengths than what it is compared with")
        cache.greedy = [shared_length(*pair) for pair in zip(result["tokens"], expected, strict=True)]
