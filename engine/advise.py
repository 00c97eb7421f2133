"""`frostline advise`: loads the user's own model and rows once, climbs the ladder, and leaves an answer in a folder.

Whatever ends it, a budget or a signal, what has been found until then is written: advice.json, advice.html and the
recipe. It reads no test split and trains nothing that is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from engine import start, store
from engine.advising import advicepage, advised, bench, ladder
from engine.advising.advice import Advice, Rung
from engine.advising.budget import Budget, Clock
from engine.devices.processes import asked_to_stop, launched
from engine.errors import REFUSED, STOPPED, RunError
from engine.keeping import durable
from engine.load import Loaded

ENDING = "-advice"
"""What the name of an advice's folder ends in."""


def advise(
    loaded: Loaded,
    name: str,
    root: Path,
    runs: Path,
    budget: Budget,
    seed: int = 0,
    min_gain: float = 0.005,
    rows: int = bench.MOST_ROWS,
) -> Iterator[Rung | Advice]:
    """Each rung as it is done, and the advice as it stands in the end.

    `seed` decides the folds, the order of rows and every resample. Raises `PlanError` for a task without one label for
    each example, `RunError` where more than one process was launched.
    """
    clock, accelerator = Clock(), launched()
    if accelerator.num_processes > 1:
        raise RunError("advice is measured by one process; start `frostline advise` without a launcher", REFUSED)
    folder = runs / f"{name}{ENDING}"
    with ExitStack() as held:
        held.enter_context(durable.lock(folder))
        held.enter_context(asked_to_stop(lambda: setattr(clock, "stopped", True)))
        cache = start.cache_of(loaded.recipe, runs / store.FOLDER, accelerator)
        gathered = bench.gather(loaded.recipe, root, cache, accelerator, rows, seed)
        climbing = ladder.begin(gathered, name, budget, clock, seed, min_gain)
        for rung in climbing.climb():
            yield rung
            write(climbing.advice, gathered, loaded, folder)
        yield climbing.advice
        if clock.stopped:
            raise RunError("stopped as asked; the answer is the best that was found until then", STOPPED)


def write(advice: Advice, gathered: bench.Bench, loaded: Loaded, folder: Path) -> None:
    """The papers of advice as it stands, each in one piece."""
    durable.replace(folder / "advice.json", json.dumps(advice.json(), indent=1, default=str).encode())
    if advice.verdict:
        advised.write(advice, gathered, loaded.source.resolved, folder / f"{advice.recipe}.advised.yaml")
        advicepage.write(advice, folder)
