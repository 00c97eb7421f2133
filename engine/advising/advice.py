"""Advice as a value: what was measured on each rung, the decision, and what is missing. It measures nothing itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.advising.answers import Interval, Verdict, deepest, gains
from engine.advising.units import HEAD, Unit


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder, done."""

    name: str
    seconds: float
    said: tuple[str, ...]
    """What came of it, in words."""


@dataclass(frozen=True)
class Probed:
    """What a linear probe has read."""

    accuracy: float
    error: float
    loss: float


@dataclass
class Advice:
    """What is known so far; it grows rung by rung, and is worth reading at any time."""

    recipe: str
    """Name of the recipe."""
    architecture: str
    metric: str
    rows: int
    available: int
    classes: int
    folds: int
    seed: int
    budget: str
    min_gain: float
    steps: int
    """Length of a finalist's run."""
    short_steps: int
    batch_size: int
    units: tuple[Unit, ...]
    rungs: list[Rung] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """What there was no time for, in words."""
    notes: list[str] = field(default_factory=list)
    step_seconds: float | None = None
    """A step that trains everything."""
    probes: dict[str, Probed] = field(default_factory=dict)
    """Unit -> what is read off it."""
    controls: dict[str, float] = field(default_factory=dict)
    """What a probe reads that has no right to: majority, shuffled labels, the bare input."""
    together: Probed | None = None
    """All layers read at once."""
    growth: dict[int, float] = field(default_factory=dict)
    """Rows -> what is read off the best layer with so many."""
    measurable: bool = True
    """Whether there are rows enough to tell anything (rule D0)."""
    head_rate: float | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Signal -> unit -> score."""
    agreement: dict[str, float | None] = field(default_factory=dict)
    """Signal -> rank correlation with the short runs."""
    short: dict[str, list[Any]] = field(default_factory=dict)
    """Candidate -> its short runs, the head's own fit among them."""
    finals: dict[str, list[Any]] = field(default_factory=dict)
    verdict: Verdict | None = None
    when: Interval | None = None
    """What fitting the head first has gained the chosen candidate."""
    spent: float = 0.0
    stopped: bool = False
    """Whether a signal ended it."""

    @property
    def best_layer(self) -> str | None:
        """The unit that a probe reads best."""
        return max(self.probes, key=lambda name: -self.probes[name].loss, default=None)

    @property
    def last_layer(self) -> str | None:
        return next(reversed(self.probes), None)

    @property
    def lost_above(self) -> str | None:
        """Rule D2: the layer that reads better than the last by more than two standard errors."""
        best, last = self.best_layer, self.last_layer
        if best is None or last is None or best == last:
            return None
        found = self.probes[best]
        return best if found.accuracy - self.probes[last].accuracy > 2 * found.error else None

    def ranking(self) -> list[str]:
        """Single units by what training them alone has gained, out of fold, in short runs; the best first.

        Those that were tried on the first fold alone had been beaten there, and come last.
        """
        found = gains(self.short)
        singles = [unit.name for unit in self.units if unit.name in found]
        beyond = deepest(singles, self.short)
        return sorted(singles, key=lambda name: (name not in beyond, -found[name]))

    def suspects(self) -> list[str]:
        """Units that the model says more without, by two standard errors at least; the surest first."""
        found = self.scores.get("bypass", {})
        return sorted((name for name in found if found[name] > 2), key=lambda name: -found[name])

    def json(self) -> dict[str, Any]:
        """Everything but what single rows were taken for, as plain values."""
        said = {
            key: value
            for key, value in vars(self).items()
            if key not in ("short", "finals", "units", "rungs", "probes", "together", "verdict", "when")
        }
        return {
            **said,
            "rungs": [asdict(rung) for rung in self.rungs],
            "units": [{"name": u.name, "pattern": u.pattern, "parameters": u.size} for u in self.units],
            "probes": {name: asdict(found) for name, found in self.probes.items()},
            "together": None if self.together is None else asdict(self.together),
            "when": None if self.when is None else asdict(self.when),
            "short_gains": gains(self.short),
            "ranking": self.ranking(),
            "runs": {"short": _runs(self.short), "full": _runs(self.finals)},
            "verdict": None if self.verdict is None else asdict(self.verdict),
            "hash": self.hash,
        }

    @property
    def hash(self) -> str:
        """What was decided and from which numbers, times aside: equal for equal advice."""
        found = self.verdict
        runs = _runs(self.short) + _runs(self.finals)
        facts = [
            self.recipe, self.metric, self.rows, self.seed, self.steps, self.short_steps,
            None if found is None else (found.need, found.chosen, found.best),
            [(run["candidate"], run["fold"], run["rate"], run["loss"]) for run in runs],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _runs(runs: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        {
            "candidate": run.candidate,
            "fold": run.fold,
            "rate": None if name == HEAD else run.rate,
            "steps": run.steps,
            "loss": round(float(run.losses.mean()), 9),
            "rows": len(run.rows),
            "seconds": run.seconds,
        }
        for name, each in runs.items()
        for run in each
    ]
