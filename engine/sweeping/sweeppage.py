"""What a sweep leaves to be read: one self-contained page, the plain values of its curve, and the recipe it selected.

It shows what was measured and computes none of it. The page holds no script, loads nothing, and escapes what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.report import metric, render
from engine.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick, label, ticks
from engine.reporting.picture import count, duration
from engine.sweeping.curve import Curve, Row

if TYPE_CHECKING:
    from engine.load import Loaded
    from engine.sweep import Asked

MOST_LABELS = 9
"""Points up to which the curve is drawn as a chart as well; more would not find room for their names."""
DEPTHS = ("head", "top-", "all-blocks", "full")
"""How the names of depths begin."""
ROOM = 6.0
"""Percent of a whisker's cell that is left free on either side."""


def plain(found: Curve) -> dict[str, Any]:
    """The curve as JSON values."""
    rows = [
        {
            "point": row.point,
            "variant": row.variant,
            "mean": row.mean,
            "interval": row.half,
            "standard_error": row.error,
            "values": {each.seed: each.value for each in row.outcomes},
            "within_one_standard_error": row.within,
            "parameters": row.size,
            "steps": row.steps,
            "seconds": row.seconds,
            "seconds_per_step": row.step_seconds,
            "memory_bytes": row.peak_bytes,
            "flops": row.flops,
            "tried": dict(row.tried),
            "failed": row.failed,
        }
        for row in found.rows
    ]
    best, chosen = (row.point if row else None for row in (found.best, found.chosen))
    return {"metric": found.metric, "greater_is_better": found.greater, "best": best, "chosen": chosen, "rows": rows}


def told(row: Row) -> str:
    """A point's result in words: mean, and the half of its interval where there is one."""
    return metric(row.mean) if row.half is None else f"{metric(row.mean)} ± {row.half:.3f}"


def recipe(loaded: Loaded, found: Curve, source: Path, folder: Path) -> str:
    """The selected point's recipe as YAML, its comments saying why; raises `ValueError` where nothing was selected."""
    if found.chosen is None or found.best is None:
        raise ValueError("nothing was selected")
    seeds = len(found.chosen.outcomes)
    lines = [
        f"Selected by `frostline sweep {source}` on the validation rows, {seeds} seed{'s' * (seeds > 1)} a point.",
        f"{found.metric}: {found.chosen.point} {told(found.chosen)}, the best {found.best.point} {told(found.best)}.",
        "This is the smallest that comes within one standard error of the best.",
        "",
        *(f"  {row.point:<14} {told(row):<16} {count(row.size):>7} parameters  {row.variant}" for row in found.rows),
        f"All of it is in {folder / 'sweep.html'}.",
    ]
    from engine.recipe import Recipe

    said = loaded.source.resolved
    ordered = {key: said[key] for key in Recipe.model_fields if key in said}
    return "".join(f"# {_plain(line)}".rstrip() + "\n" for line in lines) + "\n" + _yaml(ordered)


def _plain(line: str) -> str:
    from engine.grammar.source import clean

    return clean(line).rstrip()


def _yaml(value: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = None
    yaml.width = 120
    text = StringIO()
    yaml.dump(dict(value), text)
    return text.getvalue()


@dataclass(frozen=True)
class Whisker:
    """A point's result on one line, in percent of its width from the left."""

    mean: float
    low: float
    high: float
    dots: tuple[float, ...]
    """One for each seed."""


@dataclass(frozen=True)
class Mark:
    """A point in a chart."""

    x: float
    y: float
    low: float
    high: float
    dots: tuple[float, ...]
    name: str
    style: str


@dataclass(frozen=True)
class Drawn:
    """A chart of points side by side, in the units of `engine.reporting.charts`."""

    title: str
    said: str
    marks: tuple[Mark, ...]
    up: tuple[Tick, ...]
    path: str = ""
    band: tuple[float, float] | None = None
    """Top and height of what lies within one standard error of the best."""
    bars: bool = False
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def page(found: Curve, test: Mapping[str, float], asked: Asked, folder: Path) -> str:
    """The page of a sweep, over or not."""
    rows = [(row, _whisker(row, found)) for row in found.rows]
    chosen = folder / "chosen.yaml"
    return render(
        "sweep.html.j2",
        name=folder.name,
        source=str(asked.recipe),
        same=asked.same,
        over=[word.partition("=")[0] for word in asked.over],
        curve=found,
        rows=rows,
        stripe=_stripe(found),
        ends=_ends(found),
        charts=_charts(found),
        tried=_tried(found.rows),
        test=test,
        told=told,
        recipe=chosen.read_text(encoding="utf-8") if found.chosen and chosen.exists() else "",
    )


def _reach(found: Curve) -> tuple[float, float] | None:
    """The least and the most that any point's interval or seed reaches; None where nothing was judged."""
    ends = [end for row in found.rows if row.mean is not None for end in (*_span(row), *row.values)]
    ends = [end for end in ends if math.isfinite(end)]
    if not ends:
        return None
    room = (max(ends) - min(ends)) * 0.02 or abs(max(ends)) * 0.1 or 1.0
    return min(ends) - room, max(ends) + room


def _span(row: Row) -> tuple[float, float]:
    """A point's interval, cut to twice what its seeds spread over: that of two seeds may be wider than the page."""
    mean, half = row.mean or 0.0, row.half or 0.0
    return mean - half, mean + half


def _place(value: float, found: Curve) -> float:
    low, high = _reach(found) or (0.0, 1.0)
    share = (value - low) / (high - low)
    return round(ROOM + (100 - 2 * ROOM) * share, 2)


def _whisker(row: Row, found: Curve) -> Whisker | None:
    if row.mean is None:
        return None
    low, high = (_place(end, found) for end in _span(row))
    return Whisker(_place(row.mean, found), low, high, tuple(_place(value, found) for value in row.values))


def _stripe(found: Curve) -> tuple[float, float] | None:
    """Where the page shades what lies within one standard error of the best: start and width in percent."""
    if found.best is None or found.best.mean is None or found.best.error is None:
        return None
    worse = found.best.mean - found.best.error * (1 if found.greater else -1)
    start, end = sorted((_place(worse, found), _place(found.best.mean, found)))
    return start, max(round(end - start, 2), 0.2)


def _ends(found: Curve) -> tuple[str, str]:
    reach = _reach(found)
    return (metric(reach[0]), metric(reach[1])) if reach else ("", "")


def _charts(found: Curve) -> list[Drawn]:
    """The curve and its cost: over the depths alone where there are single units as well, which the table shows."""
    rows = [row for row in found.rows if row.mean is not None]
    if len(rows) > MOST_LABELS:
        rows = [row for row in rows if row.point.startswith(DEPTHS)][:MOST_LABELS]
    return [_curve(found, rows), _cost(found, rows)] if len(rows) > 1 else []


def _curve(found: Curve, rows: Sequence[Row]) -> Drawn:
    low, high = _reach(found) or (0.0, 1.0)
    up = ticks(low, high)
    name = found.metric.replace("_", " ")

    def y(value: float) -> float:
        return _height(value, up)

    marks = []
    for x, row in zip(_columns(len(rows)), rows, strict=True):
        low, high = map(y, _span(row))
        seeds = tuple(map(y, row.values))
        marks.append(Mark(x, y(row.mean or 0.0), low, high, seeds, _short(row), _style(row, found)))
    path = "".join(f"{'L' if place else 'M'}{mark.x:g} {mark.y:g}" for place, mark in enumerate(marks))
    band = None
    if found.best and found.best.mean is not None and found.best.error is not None:
        worse = found.best.mean - found.best.error * (1 if found.greater else -1)
        top, bottom = sorted((y(found.best.mean), y(worse)))
        band = (top, max(bottom - top, 1.0))
    said = f"{name} on validation: " + ", ".join(f"{row.point} {told(row)}" for row in rows) + "."
    return Drawn(f"{name.capitalize()} on validation", said, tuple(marks), _ticks(up), path, band)


def _cost(found: Curve, rows: Sequence[Row]) -> Drawn:
    up = ticks(0.0, max(row.seconds for row in rows) or 1.0)
    marks = []
    for x, row in zip(_columns(len(rows)), rows, strict=True):
        top = _height(row.seconds, up)
        marks.append(Mark(x, top, HEIGHT - BOTTOM, top, (), _short(row), _style(row, found)))
    said = "Seconds of a run: " + ", ".join(f"{row.point} {duration(row.seconds)}" for row in rows) + "."
    return Drawn("Seconds of one run", said, tuple(marks), _ticks(up), bars=True)


def _columns(count: int) -> list[float]:
    step = (WIDTH - LEFT - RIGHT) / count
    return [round(LEFT + step * (place + 0.5), 2) for place in range(count)]


def _height(value: float, up: Sequence[float]) -> float:
    share = (value - up[0]) / (up[-1] - up[0])
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def _ticks(up: Sequence[float]) -> tuple[Tick, ...]:
    return tuple(Tick(_height(value, up), label(value)) for value in up)


def _short(row: Row) -> str:
    """A point's name where there is room for six letters."""
    return row.point.removeprefix("top-").replace("all-blocks", "all").replace("embeddings", "emb")[:8]


def _style(row: Row, found: Curve) -> str:
    return "train" if found.chosen and row.point == found.chosen.point else "judge" if row.within else "quiet"


def _tried(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Each point that was tuned, with what each variant came to and whether it was taken."""
    return [
        (row.point, [(name, metric(value), name == row.variant) for name, value in row.tried.items()])
        for row in rows
        if len(row.tried) > 1
    ]
