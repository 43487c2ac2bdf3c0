"""Drawings as SVG that takes its colours from the page's style sheet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 380, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 42
FONT_SIZE = 11
LABEL_OFFSET = 9

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """Numbers to positions.

    Attributes:
        title: What the numbers are.
        low: The smallest.
        high: The largest.
        is_log: Whether equal ratios, rather than differences, are equally far apart.
        unit: What follows a tick's number.
    """

    title: str
    low: float
    high: float
    is_log: bool = False
    unit: str = ""

    @classmethod
    def around(cls, title: str, values: Sequence[float], *, is_log: bool = False, unit: str = "") -> "Axis":
        """An axis for these values: whole powers of ten, or from zero to a round number."""
        if is_log:
            low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
            return cls(title, 10.0**low, 10.0 ** max(high, low + 1), True, unit)
        step = _round_step(max(values) / 5)
        return cls(title, 0, step * math.ceil(max(values) * 1.02 / step), False, unit)

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """The values that get a number."""
        if self.is_log:
            return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = _round_step((self.high - self.low) / 5)
        return [self.low + step * number for number in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]

    def label(self, value: float) -> str:
        """The number at a tick."""
        return f"{value:,.10g}{self.unit}"


class Drawing:
    """Two axes, and what is drawn between them.

    Args:
        name: What it shows, for those who cannot see it.
        x: The horizontal axis.
        y: The vertical axis.
    """

    def __init__(self, name: str, x: Axis, y: Axis) -> None:
        self._x, self._y = x, y
        self._taken: list[Box] = []
        self._root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": name, "font-size": str(FONT_SIZE)}
        )
        self._draw_axes()

    def markup(self) -> Markup:
        """The drawing, to be put into a page."""
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))

    def place(self, x: float, y: float) -> Point:
        """Where values lie in the drawing."""
        across = LEFT + self._x.share(x) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - self._y.share(y) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Iterable[Point], style: str) -> None:
        """A line through values."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        self._add("polyline", {"points": places, "class": f"line {style}"})

    def upright(self, x: float, text: str) -> None:
        """A dashed line from below to above at a value, with a word beside it."""
        across, _ = self.place(x, self._y.low)
        ends = {"x1": f"{across:.1f}", "x2": f"{across:.1f}", "y1": str(TOP), "y2": str(HEIGHT - BOTTOM)}
        self._add("line", {**ends, "class": "aside"})
        anchor = "end" if across > WIDTH / 2 else "start"
        shift = -5 if anchor == "end" else 5
        self._text(across + shift, TOP + FONT_SIZE, text, anchor, "aside-label")
        self._taken.append(_box(across + shift, TOP + FONT_SIZE, text, anchor))

    def points(self, points: Sequence[tuple[Point, str, str, str]]) -> None:
        """Points with names.

        Args:
            points: Values, name, style and what is said on hovering.
        """
        places = [self.place(*point) for point, *_ in points]
        self._taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
        for (x, y), (_, _, style, said) in zip(places, points, strict=True):
            group = self._add("g", {"class": f"point {style}"})
            ElementTree.SubElement(group, "title").text = said
            ElementTree.SubElement(group, "path", {"d": marker(style), "transform": f"translate({x:.1f} {y:.1f})"})
        for (x, y), (_, name, _, _) in zip(places, points, strict=True):
            self._name(x, y, name)

    def _name(self, x: float, y: float, text: str) -> None:
        """A name where there is room for it, else to the right."""
        middle = y + FONT_SIZE / 3
        sides = ((LABEL_OFFSET, "start"), (-LABEL_OFFSET, "end"))
        spots = [
            (x + LABEL_OFFSET, middle, "start"),
            (x - LABEL_OFFSET, middle, "end"),
            (x, y - LABEL_OFFSET, "middle"),
            (x, y + LABEL_OFFSET + FONT_SIZE * 0.7, "middle"),
            *((x + side, middle + rows * FONT_SIZE, anchor) for rows in (-1, 1, -2, 2) for side, anchor in sides),
        ]
        free = (spot for spot in spots if self._has_room(_box(spot[0], spot[1], text, spot[2])))
        across, down, anchor = next(free, spots[0])
        self._taken.append(_box(across, down, text, anchor))
        self._text(across, down, text, anchor, "name")

    def _has_room(self, box: Box) -> bool:
        left, top, right, bottom = box
        inside = left >= LEFT and right <= WIDTH and top >= 0 and bottom <= HEIGHT - BOTTOM
        return inside and not any(
            left < other[2] and other[0] < right and top < other[3] and other[1] < bottom for other in self._taken
        )

    def _draw_axes(self) -> None:
        for value in self._x.ticks():
            across, _ = self.place(value, self._y.low)
            self._text(across, HEIGHT - BOTTOM + 15, self._x.label(value), "middle", "tick")
        for value in self._y.ticks():
            _, down = self.place(self._x.low, value)
            ends = {"x1": str(LEFT), "x2": str(WIDTH - RIGHT), "y1": f"{down:.1f}", "y2": f"{down:.1f}"}
            self._add("line", {**ends, "class": "grid"})
            self._text(LEFT - 6, down + FONT_SIZE / 3, self._y.label(value), "end", "tick")
        self._text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self._x.title, "middle", "axis-title")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        title = self._text(11, middle, self._y.title, "middle", "axis-title")
        title.set("transform", f"rotate(-90 11 {middle:.1f})")

    def _text(self, x: float, y: float, text: str, anchor: str, style: str) -> ElementTree.Element:
        element = self._add("text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": style})
        element.text = text
        return element

    def _add(self, tag: str, attributes: dict[str, str]) -> ElementTree.Element:
        return ElementTree.SubElement(self._root, tag, attributes)


def marker(style: str) -> str:
    """The outline of a point, one for each family, so that colour is not all that tells them apart."""
    circle = "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z"
    outlines = {
        "quanto": "M-4 -4H4V4H-4Z",
        "hqq": "M0 -5L5 4H-5Z",
        "fp8": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
        "uncompressed": "M-5 -1.5H-1.5V-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5Z",
    }
    return outlines.get(style, circle)


def _box(x: float, y: float, text: str, anchor: str) -> Box:
    """About where a text is."""
    width = 0.64 * FONT_SIZE * len(text)
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - FONT_SIZE * 0.8, left + width, y + FONT_SIZE * 0.25


def _round_step(rough: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
