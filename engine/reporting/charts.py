"""Geometry of line charts: series of numbers -> paths, ticks and bands, as values that a template draws as SVG.

It knows no run and writes no markup, so nothing here has to be escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 22.0, 26.0
"""Room around the plot for labels, in the chart's own units."""
MOST_POINTS = 400
"""Points of a line at most: more than a chart has pixels for."""
MOST_DOTS = 16
"""Points of a line up to which each is drawn as a dot; more would hide the line."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Numbers over steps."""

    name: str
    points: tuple[Point, ...]
    style: str
    """The class that a stylesheet knows it by."""
    dots: bool = False
    """Whether each point is a measurement of its own, to be seen."""


@dataclass(frozen=True)
class Span:
    """A stage on the axis of steps."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Line:
    name: str
    style: str
    path: str
    """The `d` of an SVG path."""
    dots: tuple[Point, ...]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Band:
    name: str
    x: float
    width: float


@dataclass(frozen=True)
class Chart:
    """A chart of `WIDTH` by `HEIGHT`."""

    title: str
    said: str
    """The chart in a sentence, for those who can't see it."""
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    bands: tuple[Band, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def chart(title: str, series: Sequence[Series], spans: Sequence[Span] = (), zero: bool = False) -> Chart | None:
    """The chart of some series, stages as bands behind them; None where there is nothing to draw.

    `zero` keeps zero on the upward axis. Points that are not finite are left out.
    """
    kept = [Series(s.name, tuple(p for p in s.points if math.isfinite(p[1])), s.style, s.dots) for s in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return None
    last = max([x for one in kept for x, _ in one.points] + [span.end for span in spans])
    values = [y for one in kept for _, y in one.points]
    up = ticks(min(0.0, *values) if zero else min(values), max(values))
    across = ticks(0.0, last or 1.0)
    scale = _Scale(0.0, last or 1.0, up[0], up[-1])
    return Chart(
        title=title,
        said=_sentence(title, kept),
        lines=tuple(_line(one, scale, [span.end for span in spans]) for one in kept),
        across=tuple(Tick(scale.x(value), label(value)) for value in across if value <= (last or 1.0)),
        up=tuple(Tick(scale.y(value), label(value)) for value in up),
        bands=tuple(Band(s.name, scale.x(s.start), scale.x(s.end) - scale.x(s.start)) for s in spans),
    )


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def label(value: float) -> str:
    """A number at an axis: 12000 -> `12k`, 0.0002 -> `2e-4`."""
    if value and abs(value) < 0.01:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def _line(series: Series, scale: _Scale, ends: Sequence[float]) -> Line:
    """The line through a series; what is no measurement of its own starts anew after each of `ends`."""
    points = _thinned(series.points)
    places = [(scale.x(x), scale.y(y)) for x, y in points]
    stages = [0 if series.dots else sum(x > end for end in ends) for x, _ in points]
    fresh = [index == 0 or stages[index - 1] != stage for index, stage in enumerate(stages)]
    path = "".join(f"{'M' if new else 'L'}{x:g} {y:g}" for new, (x, y) in zip(fresh, places, strict=True))
    dotted = len(places) == 1 or (series.dots and len(places) <= MOST_DOTS)
    return Line(series.name, series.style, path, tuple(places) if dotted else ())


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Every n-th point and always the last, so that a long run stays a small file."""
    every = math.ceil(len(points) / MOST_POINTS)
    return points if every == 1 else [*points[:-1:every], points[-1]]


def _sentence(title: str, series: Sequence[Series]) -> str:
    ends = (f"{one.name} goes from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in series)
    return f"{title}: {'; '.join(ends)}."
