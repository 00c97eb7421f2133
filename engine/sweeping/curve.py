"""From the runs of a sweep to its curve: means and intervals, who is as good as the best, and which point to take.

Pure arithmetic on what was measured on the validation rows; it has never seen a test split.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.records import Event

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    point: str
    variant: str
    seed: int
    value: float | None
    """The metric that decides; None where the run failed."""
    loss: float | None = None
    failed: str = ""
    """Why, in a sentence."""
    size: int = 0
    """Number of elements that trained at once, at most."""
    steps: int = 0
    """Steps of its last stage."""
    seconds: float = 0.0
    step_seconds: float | None = None
    peak_bytes: int = 0
    """Memory on top of what the process took before."""
    flops: float = 0.0


@dataclass(frozen=True)
class Row:
    """One point of the curve, by the variant that speaks for it."""

    point: str
    variant: str = ""
    outcomes: tuple[Outcome, ...] = ()
    """One for each seed."""
    tried: Mapping[str, float | None] = field(default_factory=dict)
    """Each variant with its value at the first seed."""
    within: bool = False
    """Whether it is as good as the best, give or take one standard error."""

    @property
    def failed(self) -> str:
        """Why it can't be counted on, if it can't."""
        return next((each.failed for each in self.outcomes if each.failed), "" if self.outcomes else "nothing ran")

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(each.value for each in self.outcomes if each.value is not None)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values and not self.failed else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    @property
    def half(self) -> float | None:
        """Half of the 95% interval of the mean, by Student's t; None for one seed."""
        return None if self.error is None else self.error * quantile(len(self.values) - 1)

    @property
    def size(self) -> int:
        return max((each.size for each in self.outcomes), default=0)

    @property
    def steps(self) -> int:
        return max((each.steps for each in self.outcomes), default=0)

    @property
    def flops(self) -> float:
        return max((each.flops for each in self.outcomes), default=0.0)

    @property
    def seconds(self) -> float:
        """Of one run, the median over seeds: the first one may have filled the cache for all."""
        return statistics.median([each.seconds for each in self.outcomes] or [0.0])

    @property
    def step_seconds(self) -> float | None:
        known = [each.step_seconds for each in self.outcomes if each.step_seconds is not None]
        return statistics.median(known) if known else None

    @property
    def peak_bytes(self) -> int:
        return max((each.peak_bytes for each in self.outcomes), default=0)


@dataclass(frozen=True)
class Curve:
    """All points, and what follows from them."""

    metric: str
    greater: bool
    """Whether more of the metric is better."""
    rows: tuple[Row, ...]
    best: Row | None
    chosen: Row | None
    """The smallest point that is as good as the best, give or take one standard error."""


@dataclass(frozen=True)
class Tried(Event):
    """One run of the sweep is over."""

    point: str
    variant: str
    seed: int
    metric: str
    value: float | None
    seconds: float
    failed: str = ""
    known: bool = False
    """Whether it was done before, and only read."""


@dataclass(frozen=True)
class Swept(Event):
    """The sweep is over."""

    curve: Curve
    page: Path
    recipe: Path | None
    """The recipe of the point that was selected."""
    test: dict[str, float] = field(default_factory=dict)
    """What it scores on the test split, where the recipe names one."""


def quantile(freedom: int) -> float:
    """Student's t beyond which a twentieth lies, half of it on either side."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def better(greater: bool) -> Callable[[float], float]:
    """What to take the maximum of."""
    return (lambda value: value) if greater else (lambda value: -value)


def speaks(outcomes: Sequence[Outcome], greater: bool) -> str | None:
    """The variant with the best value at one seed, the lower loss where values tie; None where every one failed."""
    sign = better(greater)
    kept = [each for each in outcomes if each.value is not None and math.isfinite(each.value)]
    ranked = max(kept, key=lambda o: (sign(o.value or 0.0), -(math.inf if o.loss is None else o.loss)), default=None)
    return ranked.variant if ranked else None


def curve(metric: str, greater: bool, rows: Sequence[Row]) -> Curve:
    """The curve of some rows: which are within one standard error of the best, and the smallest of these.

    The rule is Breiman et al. 1984 (Classification and Regression Trees). Smallest is what trains the fewest
    parameters; where that ties, what does the least work; then the better one. With one seed there is no standard
    error, and none but ties are as good as the best.
    """
    sign = better(greater)
    judged = [(row, sign(mean)) for row in rows if (mean := row.mean) is not None and math.isfinite(mean)]
    if not judged:
        return Curve(metric, greater, tuple(rows), None, None)
    best, most = max(judged, key=lambda pair: pair[1])
    least = most - (best.error or 0.0)
    near = {row.point: mean for row, mean in judged if mean >= least}
    marked = tuple(Row(r.point, r.variant, r.outcomes, r.tried, r.point in near) for r in rows)
    found = {row.point: row for row in marked}
    chosen = min((found[name] for name in near), key=lambda row: (row.size, row.flops, -near[row.point]))
    return Curve(metric, greater, marked, found[best.point], chosen)
