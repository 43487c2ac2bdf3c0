"""The drawings of a run."""

from dataclasses import dataclass

from markupsafe import Markup

from turboquant_hf.tools.caches import UNCOMPRESSED
from turboquant_hf.tools.eval.results import Quality
from turboquant_hf.tools.eval.summary import CacheSummary, RunSummary
from turboquant_hf.tools.report.svg import Axis, Drawing, Point

# What is so close to nothing is drawn at the lower end of a logarithmic axis.
SMALLEST_KL = 1e-6


@dataclass(frozen=True)
class Series:
    """A name in a legend.

    Attributes:
        style: Class in the style sheet.
        name: What it is called.
    """

    style: str
    name: str


def families(summary: RunSummary) -> list[Series]:
    """The families of caches that have points."""
    drawn = [cache.cache.family for cache in summary.caches if cache.quality and cache.cache.name != UNCOMPRESSED]
    return [Series(family, family) for family in dict.fromkeys(drawn)]


def kl_against_bytes(summary: RunSummary) -> Markup | None:
    """Mean KL of every cache against its bytes."""
    measured = _measured(summary)
    compared = [(cache, quality) for cache, quality in measured if cache.cache.name != UNCOMPRESSED]
    if not compared:
        return None
    drawing = Drawing(
        f"Mean KL against bytes per token, {summary.model}",
        Axis.around("bytes per token", [quality.bytes_per_token for _, quality in measured]),
        Axis.around(
            "mean KL, nats per token", [max(quality.mean_kl, SMALLEST_KL) for _, quality in compared], is_log=True
        ),
    )
    for cache, quality in measured:
        if cache.cache.name == UNCOMPRESSED:
            drawing.upright(quality.bytes_per_token, "uncompressed")
    drawing.points(
        [
            (
                (quality.bytes_per_token, max(quality.mean_kl, SMALLEST_KL)),
                cache.cache.name,
                cache.cache.family,
                f"{cache.cache.name}: {quality.bytes_per_token:,.0f} bytes per token, KL {quality.mean_kl:.4f}",
            )
            for cache, quality in compared
        ]
    )
    return drawing.markup()


def speed_against_bytes(summary: RunSummary) -> Markup | None:
    """Decoding speed of every cache against its bytes, and the line of those that none beats in both."""
    points: list[tuple[Point, CacheSummary]] = []
    for cache, quality in _measured(summary):
        ratio = 1.0 if cache.cache.name == UNCOMPRESSED else cache.speed_ratio
        if ratio is not None:
            points.append(((quality.bytes_per_token, ratio), cache))
    if len(points) < 2:
        return None
    drawing = Drawing(
        f"Decoding speed against bytes per token, {summary.model}",
        Axis.around("bytes per token", [point[0] for point, _ in points]),
        Axis.around("decoding speed, uncompressed = 1", [point[1] for point, _ in points], unit="x"),
    )
    drawing.line(pareto([point for point, _ in points]), "front")
    drawing.points(
        [
            (
                point,
                cache.cache.name,
                cache.cache.family,
                f"{cache.cache.name}: {point[0]:,.0f} bytes per token, {point[1]:.2f} times the uncompressed speed",
            )
            for point, cache in points
        ]
    )
    return drawing.markup()


def pareto(points: list[Point]) -> list[Point]:
    """Those of (bytes, speed) that no other beats in both, by bytes."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def error_by_layer(summary: RunSummary) -> tuple[Markup, list[Series]] | None:
    """The error of every layer's output, a line for each preset, and the legend."""
    measured = [cache for cache in summary.caches if len(cache.layers) > 1]
    errors = [layer.output_error for cache in measured for layer in cache.layers if layer.output_error > 0]
    if not errors:
        return None
    last = max(layer.index for cache in measured for layer in cache.layers)
    drawing = Drawing(
        f"Error of each layer's attention output, {summary.model}",
        Axis("layer", 0, last),
        Axis.around("squared error of the output, relative", errors, is_log=True),
    )
    for number, cache in enumerate(measured):
        drawing.line(
            [(layer.index, layer.output_error) for layer in cache.layers if layer.output_error > 0], f"preset-{number}"
        )
    return drawing.markup(), [Series(f"preset-{number}", cache.cache.name) for number, cache in enumerate(measured)]


def _measured(summary: RunSummary) -> list[tuple[CacheSummary, Quality]]:
    return [(cache, cache.quality) for cache in summary.caches if cache.quality is not None]
