"""Advice -> one self-contained advice.html and its picture: the five answers, three charts, the table, what it cost.

It shows what the advice holds and computes nothing but where to draw it. The page holds no script and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import report
from engine.advising import sayings
from engine.advising.advice import Advice
from engine.advising.answers import NORMAL, Ranked, gains
from engine.advising.units import HEAD
from engine.keeping import durable
from engine.reporting import charts

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440.0, 280.0, 46.0, 14.0, 16.0, 42.0
BAR_LEFT = 92.0
"""Room for the names of units beside bars."""
APART = 14.0
"""Least distance of two labels, in the panel's own units."""
LEGEND = "Filled: within one of the best. Ringed: chosen."

Place = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A measurement as a dot, with the whisker of its interval."""

    name: str
    x: float
    y: float
    low: float
    high: float
    style: str
    ring: bool = False
    label: Place | None = None
    """Where its name is written, if it is."""
    anchor: str = "start"


@dataclass(frozen=True)
class Bar:
    name: str
    y: float
    height: float
    x: float
    width: float
    style: str
    value: str


@dataclass(frozen=True)
class Rule:
    """A level to compare with."""

    name: str
    y: float


@dataclass(frozen=True)
class Panel:
    """One of the three charts."""

    title: str
    said: str
    """The chart in a sentence, for those who can't see it."""
    caption: str
    up: tuple[charts.Tick, ...] = ()
    across: tuple[charts.Tick, ...] = ()
    path: str = ""
    marks: tuple[Mark, ...] = ()
    bars: tuple[Bar, ...] = ()
    rules: tuple[Rule, ...] = ()
    zero: float | None = None
    below: str = ""
    """What the horizontal axis says."""
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass
class Scale:
    """Numbers -> places between two ends of an axis."""

    ticks: list[float]
    start: float
    end: float
    labels: list[str] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 2)


def write(advice: Advice, folder: Path) -> Path:
    """Write the page and return its file."""
    page = report.render("advice.html.j2", **view(advice))
    durable.replace(folder / "advice.html", page.encode())
    return folder / "advice.html"


def view(advice: Advice) -> dict[str, Any]:
    """Everything that the page shows."""
    verdict = advice.verdict
    return {
        "advice": advice,
        "verdict": verdict,
        "answers": sayings.answers(advice),
        "panels": [panel for panel in (probe_panel(advice), gain_panel(advice), cost_panel(advice)) if panel],
        "table": verdict.table if verdict else (),
        "scores": scores(advice),
        "value": sayings.value,
        "points": sayings.points,
        "head": HEAD,
    }


def scores(advice: Advice) -> list[dict[str, Any]]:
    """Every signal's ranking of the units, and how well it agreed with the short runs."""
    from engine.signals import SIGNALS

    kinds = {kind().name: kind for kind in SIGNALS}  # pyright: ignore
    return [
        {
            "kind": kinds[name],
            "ranked": sorted(told, key=lambda unit: -told[unit]),
            "agreement": advice.agreement.get(name),
        }
        for name, told in advice.scores.items()
        if name in kinds
    ]


def probe_panel(advice: Advice) -> Panel | None:
    """Probe accuracy by layer, with what a probe reads that has no right to."""
    if not advice.probes:
        return None
    names = list(advice.probes)
    values = [100 * advice.probes[name].accuracy for name in names]
    errors = [100 * NORMAL * advice.probes[name].error for name in names]
    levels = {name: 100 * share for name, share in advice.controls.items()}
    scale = Scale(charts.ticks(min([*values, *levels.values()]), max(values) + max(errors)), HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / len(names)
    xs = [LEFT + step * (place + 0.5) for place in range(len(names))]
    best = advice.best_layer
    marks = [
        Mark(name, x, scale(v), scale(v - e), scale(v + e), "judge", name == best)
        for name, x, v, e in zip(names, xs, values, errors, strict=True)
    ]
    return Panel(
        title="What can be read off each layer",
        said=f"Probe accuracy by layer: {', '.join(f'{n} {v:.1f} %' for n, v in zip(names, values, strict=True))}.",
        caption="Accuracy of a linear probe, out of fold, in percent. Dashed: controls, which know no layer.",
        up=tuple(charts.Tick(scale(tick), charts.label(tick)) for tick in scale.ticks),
        across=tuple(charts.Tick(x, _brief(name)) for x, name in zip(xs, names, strict=True)),
        path="".join(f"{'L' if place else 'M'}{m.x:g} {m.y:g}" for place, m in enumerate(marks)),
        marks=tuple(marks),
        rules=tuple(_spread([Rule(name, scale(level)) for name, level in levels.items()])),
        below="layer, inputs on the left",
    )


def gain_panel(advice: Advice) -> Panel | None:
    """What training each unit alone gains in short runs."""
    found = gains(advice.short)
    names = [unit.name for unit in advice.units if unit.name in found][::-1]
    if not names:
        return None
    scale = Scale(
        charts.ticks(min(0.0, *(found[n] for n in names)), max(0.0, *(found[n] for n in names))),
        BAR_LEFT,
        WIDTH - RIGHT - 34,
    )
    step = (HEIGHT - BOTTOM - TOP) / len(names)
    best = advice.ranking()[0]
    bars = []
    for place, name in enumerate(names):
        ends = sorted((scale(0.0), scale(found[name])))
        y, style = TOP + step * place + step * 0.14, "train" if name == best else "soft"
        bars.append(
            Bar(
                name,
                round(y, 2),
                round(step * 0.72, 2),
                ends[0],
                round(ends[1] - ends[0], 2),
                style,
                f"{found[name]:+.2g}",
            )
        )
    return Panel(
        title="What training one unit alone gains",
        said=f"Loss out of fold, less than with the head alone: {', '.join(f'{n} {found[n]:+.3f}' for n in names)}.",
        caption=f"Loss out of fold after {advice.short_steps} steps, less than with the head alone.",
        across=tuple(charts.Tick(scale(tick), charts.label(tick)) for tick in scale.ticks),
        bars=tuple(bars),
        zero=scale(0.0),
        left=BAR_LEFT,
        below="less loss",
    )


def cost_panel(advice: Advice) -> Panel | None:
    """Cost against quality; the candidates within one standard error of the best filled, the chosen one ringed."""
    verdict = advice.verdict
    rows = [row for row in verdict.table if row.value] if verdict else []
    if verdict is None or len(rows) < 2:
        return None
    values = [row.value for row in rows if row.value]
    highs = [100 * (each.mean + each.error) for each in values]
    lows = [100 * (each.mean - each.error) for each in values]
    scale = Scale(charts.ticks(min(lows), max(highs)), HEIGHT - BOTTOM, TOP)
    across = Scale([0.0, 25.0, 50.0, 75.0, 100.0], LEFT + 14, WIDTH - RIGHT - 30)
    marks = [_priced(row, verdict.chosen, scale, across) for row in rows]
    told = [f"{row.candidate.name} {row.work:.0%} {sayings.value(row.value)}" for row in rows]
    return Panel(
        title="What it costs, and what it is worth",
        said=f"Cost and {advice.metric}: {'; '.join(told)}.",
        caption=f"{advice.metric.capitalize()} in {verdict.decided_by}, in percent, ± one standard error. {LEGEND}",
        up=tuple(charts.Tick(scale(tick), charts.label(tick)) for tick in scale.ticks),
        across=tuple(charts.Tick(across(tick), f"{tick:g}%") for tick in across.ticks),
        marks=tuple(_labelled(marks)),
        below="work of a step, the frozen part replayed",
    )


def _priced(row: Ranked, chosen: str, scale: Scale, across: Scale) -> Mark:
    found = row.value
    assert found is not None
    mean, error, name = 100 * found.mean, 100 * found.error, row.candidate.name
    style = "train" if row.near else "open"
    return Mark(
        name, across(100 * row.work), scale(mean), scale(mean - error), scale(mean + error), style, name == chosen
    )


def _labelled(marks: Sequence[Mark]) -> list[Mark]:
    """The marks with their names beside them, moved up or down where two would lie on each other."""
    placed: list[Mark] = []
    for mark in sorted(marks, key=lambda each: each.y):
        left = mark.x > (LEFT + WIDTH) * 0.58
        x, y = mark.x + (-10 if left else 10), mark.y + 4
        width = 6.4 * len(mark.name)

        def taken(y: float, x: float = x, left: bool = left, width: float = width) -> bool:
            start, end = (x - width, x) if left else (x, x + width)
            return any(_meets(other, start, end, y) for other in placed)

        while taken(y):
            y += 2
        placed.append(Mark(**{**vars(mark), "label": (x, round(y, 2)), "anchor": "end" if left else "start"}))
    return placed


def _meets(other: Mark, start: float, end: float, y: float) -> bool:
    assert other.label is not None
    x, width = other.label[0], 6.4 * len(other.name)
    first, last = (x - width, x) if other.anchor == "end" else (x, x + width)
    return abs(other.label[1] - y) < APART and first < end and start < last


def _spread(rules: Sequence[Rule]) -> list[Rule]:
    return sorted(rules, key=lambda rule: rule.y)


def _brief(name: str) -> str:
    return {"embeddings": "emb"}.get(name, name.removeprefix("blocks ").removeprefix("block "))
