"""Several runs side by side -> one page: results in a table, curves together, and what their recipes differ in.

It reads run folders and judges nothing: which run is better, and whether by more than chance, is the reader's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import report
from engine.errors import ENVIRONMENT, RunError
from engine.keeping.folder import differences
from engine.reporting.charts import Chart, Series, chart

if TYPE_CHECKING:
    import numpy as np

STYLES = ("train", "judge", "third", "fourth")
"""The colours that the stylesheet has for runs; so many can be told apart in one chart."""


DRAWS = 1_000
"""Resamples of the rows for a metric that is no share of them."""


@dataclass(frozen=True)
class Measured:
    """One metric of one run, and how far chance in the rows that judged it reaches."""

    value: float | None
    interval: tuple[float, float] | None = None
    """95%: Wilson's for a share of rows, a bootstrap's for a mean over classes; None where there are no counts."""


@dataclass(frozen=True)
class Entry:
    """One run in the comparison."""

    papers: report.Papers
    name: str
    style: str
    answer: report.Answer | None
    seconds: float
    state: str


def write(paths: Sequence[Path], to: Path) -> Path:
    """Write the comparison of two to four runs into a file and return it; raises `RunError` for other numbers."""
    if not 2 <= len(paths) <= len(STYLES):
        raise RunError(f"{len(paths)} runs can't be compared on one page; name two to {len(STYLES)}", ENVIRONMENT)
    entries = [_entry(path, index) for index, path in enumerate(paths)]
    first, *others = entries
    changes = [(other.name, list(_changes(first, other))) for other in others]
    to.parent.mkdir(parents=True, exist_ok=True)
    measured = _measured(entries)
    page = report.render(
        "comparison.html.j2",
        entries=entries,
        measured=measured,
        sure=any(one.interval for *_, values in measured for one in values),
        charts=_charts(entries),
        changes=changes,
    )
    to.write_text(page, encoding="utf-8")
    return to


def _entry(path: Path, index: int) -> Entry:
    papers = report.read(path)
    seconds = sum(event["seconds"] for event in papers.of("stage_ended"))
    return Entry(papers, str(path), STYLES[index], report.answer(papers), seconds, report.state(papers))


def _measured(entries: Sequence[Entry]) -> list[tuple[str, str, list[Measured]]]:
    """Split and metric, with what each run has of it, in the order in which the runs name them."""
    found: list[dict[tuple[str, str], float]] = []
    for entry in entries:
        said = entry.answer
        own = {(said.split, said.metric): said.value} if said else {}
        found.append(own | {(split, name): value for split, name, value in (said.others if said else ())})
    keys = dict.fromkeys(key for one in found for key in one)
    return [
        (split, name, [_sure(entry, split, name, one) for entry, one in zip(entries, found, strict=True)])
        for split, name in keys
    ]


def _sure(entry: Entry, split: str, name: str, found: Mapping[tuple[str, str], float]) -> Measured:
    value = found.get((split, name))
    kept = entry.papers.confusion.get(split)
    return Measured(value, interval(kept["counts"], name, value) if kept and value is not None else None)


def interval(counts: Sequence[Sequence[int]], name: str, value: float) -> tuple[float, float] | None:
    """The 95% interval of a metric of as many rows as a confusion counts, where the confusion gives that value.

    Other rows would give another value: Wilson (1927) says how far off for a share, resampled rows (Efron 1979) for
    `f1`, the mean over classes. What another seed of the training would give is not in it.
    """
    import numpy as np
    from scipy.stats import binomtest

    table = np.asarray(counts, dtype=np.int64)
    rows, right = int(table.sum()), int(np.trace(table))
    if not rows:
        return None
    if name == "accuracy" and abs(right / rows - value) < 1e-6:
        found = binomtest(right, rows).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if name != "f1" or abs(_f1(table) - value) > 1e-6:
        return None
    draw = np.random.default_rng(0)
    shares = (table / rows).ravel()
    drawn = [_f1(draw.multinomial(rows, shares).reshape(table.shape)) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _f1(table: np.ndarray) -> float:
    """The mean over classes of 2 right / (true + taken), of those that are there or taken."""
    both = table.sum(0) + table.sum(1)
    return float((2 * table.diagonal()[both > 0] / both[both > 0]).mean())


def _charts(entries: Sequence[Entry]) -> list[Chart]:
    """The validation loss and every metric that was measured, one line a run."""
    judged = {entry.name: entry.papers.of("evaluated", split="validation") for entry in entries}
    names = dict.fromkeys(name for events in judged.values() for event in events for name in event["metrics"])
    drawn = [
        chart(f"{name.replace('_', ' ').capitalize()}, validation", _lines(entries, judged, name)) for name in names
    ]
    return [one for one in drawn if one]


def _lines(entries: Sequence[Entry], judged: dict[str, list[Any]], name: str) -> list[Series]:
    return [
        Series(
            entry.name,
            report.points(entry.papers, judged[entry.name], lambda event: event["metrics"].get(name)),
            entry.style,
            dots=True,
        )
        for entry in entries
    ]


def _changes(first: Entry, other: Entry) -> list[str]:
    return [line.strip() for _, line in differences(first.papers.asked, other.papers.asked)]
