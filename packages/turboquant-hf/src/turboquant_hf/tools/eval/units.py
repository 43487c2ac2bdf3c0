"""The units that an evaluation consists of, by the names under which their results are kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turboquant_hf.tools.caches import CACHES, UNCOMPRESSED, NamedCache
from turboquant_hf.tools.eval.results import Failure, Greedy, LayerError, NeedleScore, Quality, Speed
from turboquant_hf.tools.eval.settings import EvalSettings

CHECK = "check"


@dataclass(frozen=True)
class Unit:
    """What is measured in one go, and kept in one go.

    Attributes:
        measurement: "check" or one of `MEASUREMENTS`.
        cache: The cache that is measured; None where it is all of them.
        length: Tokens of a prompt with a needle.
        depth: Where the needle is.
    """

    measurement: str
    cache: str | None = None
    length: int = 0
    depth: float = 0

    @property
    def name(self) -> str:
        """The name in the run file."""
        if self.cache is None:
            return f"{self.measurement}/{self.length}/{self.depth:g}"
        return f"{self.measurement}/{self.cache}"


def all_units(settings: EvalSettings) -> list[Unit]:
    """The units of an evaluation, in their order.

    Whether the caches of others serve the model at all comes first: what fails there is not measured further.
    """
    caches = [CACHES[name] for name in (UNCOMPRESSED, *settings.caches)]
    units = [Unit(CHECK, cache.name) for cache in caches if cache.is_peer]
    for measurement in settings.measurements:
        if measurement == "needle":
            cells = [(length, depth) for length in settings.needle_lengths for depth in settings.needle_depths]
            units += [Unit(measurement, length=length, depth=depth) for length, depth in cells]
        else:
            units += [Unit(measurement, cache.name) for cache in caches if _is_measured(measurement, cache)]
    return units


def missing_units(settings: EvalSettings, results: Mapping[str, Any]) -> list[Unit]:
    """The units that have no result yet, without those of caches that failed."""
    return [
        unit
        for unit in all_units(settings)
        if unit.name not in results and "fails" not in results.get(f"{CHECK}/{unit.cache}", {})
    ]


def served_caches(settings: EvalSettings, results: Mapping[str, Any]) -> list[str]:
    """The caches that did not fail, the uncompressed one first."""
    names = (UNCOMPRESSED, *settings.caches)
    return [name for name in names if "fails" not in results.get(f"{CHECK}/{name}", {})]


def _is_measured(measurement: str, cache: NamedCache) -> bool:
    return cache.is_ours if measurement == "layers" else not (measurement == "speed" and cache.name == UNCOMPRESSED)


def check_result(unit: Unit, data: object, settings: EvalSettings) -> None:
    """Raise ValueError if this is no result of the unit."""
    if _is_failure(data):
        Failure.from_dict(data)
    elif unit.measurement == "quality":
        Quality.from_dict(data)
    elif unit.measurement == "greedy":
        Greedy.from_dict(data)
    elif unit.measurement == "speed":
        Speed.from_dict(data)
    elif unit.measurement == "layers":
        indices = [LayerError.from_dict(layer).index for layer in _only(data, "layers", list)]
        if indices != sorted(set(indices)):
            raise ValueError(f"{unit.name} has a layer twice, or in another order")
    elif unit.measurement == "needle":
        for name, score in _only(data, "caches", dict).items():
            if name not in (UNCOMPRESSED, *settings.caches):
                raise ValueError(f"{unit.name} has a cache {name!r}")
            (Failure if _is_failure(score) else NeedleScore).from_dict(score)
    elif data != {}:
        raise ValueError("a check has no result but that it fails")


def _is_failure(data: object) -> bool:
    return isinstance(data, Mapping) and data.keys() == {"fails"}


def _only(data: object, key: str, kind: type) -> Any:
    if not isinstance(data, Mapping) or data.keys() != {key} or not isinstance(data[key], kind):
        raise ValueError(f"it is not {key}")
    return data[key]
