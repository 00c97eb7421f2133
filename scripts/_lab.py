"""A folder to try recipes in: each is written down, trained as any other, and asked what it came to.

What is trained here is small and thrown away, so of every run only its papers stay, unless its model is wanted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from engine import records, report, start, sweep
from engine.keeping.folder import RunFolder
from engine.load import load
from engine.sweeping.curve import Curve, Swept

ONCE = ("evaluation.eval_steps=1000000", "training.logging_steps=1000000")
"""Judge at the end of a stage and not before: nothing may be picked by the rows that are told of."""


@dataclass(frozen=True)
class Came:
    """What a run came to, in shares: accuracy on its validation and its test rows, and the loss of the former."""

    validation: float
    loss: float
    test: float


@dataclass(frozen=True)
class Finding:
    """What came of a claim."""

    lines: tuple[str, ...]
    """The numbers, as a table."""
    verdicts: tuple[tuple[str, bool], ...]
    """What was expected, in words, and whether it was seen."""


class Lab:
    """Where recipes are tried."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, recipe: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(recipe, encoding="utf-8")
        return path

    def fit(self, name: str, recipe: str, words: Sequence[str] = (), keep: bool = False) -> Came:
        """Train a recipe with `key=value` words on top; a run that is over already is only read."""
        loaded, run = load(self.write(name, recipe), (*words, *ONCE)), RunFolder(self.folder / "runs" / name)
        if run.metrics.exists() and any(event["event"] == "finished" for event in records.read(run.metrics)):
            run.refuse_changes(loaded.source.resolved, {}, sys.maxsize)
        else:
            for _ in start.run(loaded, name, self.folder, self.folder / "runs"):
                pass
        papers = report.read(run.path)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        if not keep:
            shutil.rmtree(run.model, ignore_errors=True)
        last = papers.of("stage_ended")[-1]["metrics"]
        tested = papers.of("evaluated", split="test")
        return Came(last["accuracy"], last["loss"], tested[-1]["metrics"]["accuracy"] if tested else float("nan"))

    def sweep(self, name: str, recipe: str, depths: Sequence[str], rate: float, seeds: int) -> Curve:
        """The curve of a recipe over some depths at one rate; points that are over already are only read."""
        wanted = sweep.Asked(self.write(name, recipe), ONCE, tuple(depths), rates=(rate,), seeds=seeds)
        events = list(sweep.sweep(wanted, f"{name}-sweep", self.folder, self.folder / "runs"))
        assert isinstance(events[-1], Swept)
        return events[-1].curve


def mean(found: Sequence[Came]) -> tuple[float, float]:
    """Mean accuracy on validation and on test rows."""
    return fmean(each.validation for each in found), fmean(each.test for each in found)
