"""Several runs side by side -> one page: results in a table, curves together, and what their recipes differ in.

It reads run folders and judges nothing: which run is better, and whether by more than chance, is the reader's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import report
from engine.charts import Chart, Series, chart
from engine.errors import ENVIRONMENT, RunError
from engine.folder import differences

STYLES = ("train", "judge", "third", "fourth")
"""The colours that the stylesheet has for runs; so many can be told apart in one chart."""


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
    page = report.render(
        "comparison.html.j2", entries=entries, measured=_measured(entries), charts=_charts(entries), changes=changes
    )
    to.write_text(page, encoding="utf-8")
    return to


def _entry(path: Path, index: int) -> Entry:
    papers = report.read(path)
    seconds = sum(event["seconds"] for event in papers.of("stage_ended"))
    return Entry(papers, str(path), STYLES[index], report.answer(papers), seconds, report.state(papers))


def _measured(entries: Sequence[Entry]) -> list[tuple[str, str, list[float | None]]]:
    """Split and metric, with what each run has of it, in the order in which the runs name them."""
    found: list[dict[tuple[str, str], float]] = []
    for entry in entries:
        said = entry.answer
        own = {(said.split, said.metric): said.value} if said else {}
        found.append(own | {(split, name): value for split, name, value in (said.others if said else ())})
    keys = dict.fromkeys(key for one in found for key in one)
    return [(split, name, [one.get((split, name)) for one in found]) for split, name in keys]


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
