"""What runs say about candidates and what follows from it: intervals, who is as good as the best, whether to unfreeze.

Decision rules that were fixed before anything was measured; a pure function of what runs have judged. It knows no model
and no torch.

A difference is paired: both candidates judged the same examples, having trained on the same others. Its interval is a
bootstrap over runs and, inside of a run, over examples (Efron & Tibshirani 1993, An Introduction to the Bootstrap). The
smallest candidate within one standard error of the best is chosen (Breiman et al. 1984, Classification and Regression
Trees).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from engine import metrics
from engine.advising.units import HEAD, Candidate
from engine.randomness import stable_seed

DRAWS = 2_000
"""Resamples of a bootstrap; the tenth part where a metric has to be computed anew for each."""
FEW_ROWS, FEW_OF_A_CLASS, RARE = 100, 5, 0.1
"""Nothing is measurable with fewer rows, or where more than this share of them is of classes with fewer than five."""
NORMAL = 1.96

Need = Literal["yes", "no", "undecided", "not measurable"]


@dataclass(frozen=True, eq=False)
class Judged:
    """One run of a candidate, judged example by example on rows that it didn't train on."""

    candidate: str
    fold: int
    seed: int
    rate: float
    steps: int
    rows: tuple[int, ...]
    losses: np.ndarray
    """Negative log-likelihood of each row's label (rows,)."""
    predicted: np.ndarray
    """Class that each row was taken for (rows,)."""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[int, int]:
        """What a run shares with those it is paired with."""
        return self.fold, self.seed


@dataclass(frozen=True)
class Interval:
    """A number, and how sure it is."""

    mean: float
    low: float
    """Of 95 % of what could as well have come out."""
    high: float
    error: float
    """Standard error."""
    rows: int
    """Examples that it rests on."""


@dataclass(frozen=True)
class Metric:
    """The metric that decides, on classes."""

    name: str
    labels: np.ndarray
    """The right class of every row of the pool (rows,)."""
    classes: int

    def __call__(self, rows: np.ndarray, predicted: np.ndarray) -> float:
        if self.name == "accuracy":
            return float((predicted == self.labels[rows]).mean())
        scores = np.eye(self.classes)[predicted]
        return metrics.compute([self.name], metrics.SINGLE, scores, self.labels[rows])[self.name]

    @property
    def cheap(self) -> bool:
        return self.name == "accuracy"


def usable(name: str) -> str:
    """The metric to decide by where a recipe's own is `name`: `accuracy` where that needs more than classes."""
    known = metrics.METRICS.get(name)
    return name if known and metrics.SINGLE in known.serves and not known.from_scores else "accuracy"


def value(runs: Sequence[Judged], metric: Metric, seed: int = 0) -> Interval:
    """The metric of a candidate, over all of its runs."""
    return _bootstrap([_scores(run, metric) for run in runs], metric, seed, "value")


def loss(runs: Sequence[Judged]) -> float:
    """Mean negative log-likelihood out of fold, every run weighing as much as its rows."""
    return float(np.concatenate([run.losses for run in runs]).mean()) if runs else float("inf")


def difference(better: Sequence[Judged], worse: Sequence[Judged], metric: Metric, seed: int = 0) -> Interval | None:
    """How much better one candidate is than another on the runs they share; None where they share none."""
    others = {run.key: run for run in worse}
    pairs = [(run, others[run.key]) for run in better if run.key in others]
    if not pairs:
        return None
    return _bootstrap([_scores(one, metric, other) for one, other in pairs], metric, seed, "difference")


@dataclass(frozen=True)
class _Scores:
    """What one run brings to a bootstrap: the rows, and what one or two candidates took them for."""

    rows: np.ndarray
    predicted: np.ndarray
    other: np.ndarray | None


def _scores(run: Judged, metric: Metric, other: Judged | None = None) -> _Scores:
    return _Scores(np.array(run.rows), run.predicted, None if other is None else other.predicted)


def _bootstrap(runs: Sequence[_Scores], metric: Metric, seed: int, what: str) -> Interval:
    draw = np.random.default_rng(stable_seed(seed, "bootstrap", what))
    if metric.cheap:
        right = [_right(run, metric) for run in runs]
        point = float(np.concatenate(right).mean())
        drawn = _resampled(right, draw)
    else:
        point = _compute(runs, metric)
        turns = draw.integers(len(runs), size=(DRAWS // 10, len(runs)))
        drawn = np.array([_compute([_drawn_rows(runs[each], draw) for each in turn], metric) for turn in turns])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(point, float(low), float(high), float(drawn.std(ddof=1)), sum(len(run.rows) for run in runs))


def _resampled(right: Sequence[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    """Means of resamples (draws,): runs are drawn, and of each its rows, whose values are -1, 0 and 1."""
    count = len(right)
    turns = draw.integers(count, size=(DRAWS, count))
    sums = np.empty((count, DRAWS, count))
    for index, values in enumerate(right):
        shares = [(values < 0).mean(), (values == 0).mean(), (values > 0).mean()]
        worse, _, better = np.moveaxis(draw.multinomial(len(values), shares, size=(DRAWS, count)), -1, 0)
        sums[index] = better - worse
    sizes = np.array([len(values) for values in right])
    taken = np.take_along_axis(sums, turns[None], axis=0)[0] if count > 1 else sums[0]
    return taken.sum(1) / sizes[turns].sum(1)


def _right(run: _Scores, metric: Metric) -> np.ndarray:
    truth = metric.labels[run.rows]
    right = (run.predicted == truth).astype(float)
    return right if run.other is None else right - (run.other == truth)


def _drawn_rows(run: _Scores, draw: np.random.Generator) -> _Scores:
    places = draw.integers(len(run.rows), size=len(run.rows))
    return _Scores(run.rows[places], run.predicted[places], None if run.other is None else run.other[places])


def _compute(runs: Sequence[_Scores], metric: Metric) -> float:
    rows = np.concatenate([run.rows for run in runs])
    found = metric(rows, np.concatenate([run.predicted for run in runs]))
    others = [run.other for run in runs if run.other is not None]
    return found - metric(rows, np.concatenate(others)) if others else found


@dataclass(frozen=True)
class Ranked:
    """A candidate in the table."""

    candidate: Candidate
    short_loss: float | None
    """Out-of-fold loss of its short runs."""
    value: Interval | None
    """The metric of its runs at full length."""
    gain: Interval | None
    """What it has on the frozen model, paired."""
    against: Interval | None
    """What it has on the chosen candidate, paired."""
    near: bool
    """Whether it is within one standard error of the best."""
    work: float
    """FLOPs of a step, the frozen prefix replayed, as a share of a step that trains everything."""
    seconds: float | None
    """A step as it was measured."""
    size: int
    """Parameters that train."""
    rate: float | None
    """The rate that it was best at."""


@dataclass(frozen=True)
class Verdict:
    """The decision."""

    need: Need
    chosen: str
    best: str
    gain: Interval | None
    """Of the best that unfreezes anything, over the frozen model."""
    rows_needed: int | None
    """Rows to judge by that would settle it, where it is undecided."""
    table: tuple[Ranked, ...]
    decided_by: str
    """`finalists`, `short runs`, or `prior`."""


@dataclass(frozen=True)
class Facts:
    """What a decision needs to know of candidates beside their runs."""

    candidates: Mapping[str, Candidate]
    work: Mapping[str, float]
    sizes: Mapping[str, int]
    metric: Metric
    min_gain: float
    seed: int


def enough(labels: np.ndarray) -> bool:
    """Rule D0: whether there are rows enough to tell anything."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(labels) >= FEW_ROWS and int(counts[counts < FEW_OF_A_CLASS].sum()) <= RARE * len(labels)


def decide(short: Mapping[str, Sequence[Judged]], finals: Mapping[str, Sequence[Judged]], facts: Facts) -> Verdict:
    """Rules D1 and D3: whether unfreezing gains anything, and the smallest candidate that is as good as the best.

    `short` and `finals` hold the runs of each candidate, those of the head among them. Finalists decide where there
    are two of them at least; short runs do otherwise.
    """
    decisive = _shared(finals if len(finals) > 1 else {name: short[name] for name in deepest(short, short)})
    means = {name: value(runs, facts.metric, facts.seed) for name, runs in decisive.items() if runs}
    best = max(means, key=lambda name: (means[name].mean, -loss(decisive[name])))
    near = {name for name in means if _as_good(decisive[best], decisive[name], facts)}
    chosen = min(near, key=lambda name: _price(name, facts))
    thawed = max((n for n in means if n != HEAD), key=lambda n: (means[n].mean, -loss(decisive[n])), default=None)
    gain = None if thawed is None else difference(decisive[thawed], decisive[HEAD], facts.metric, facts.seed)
    need = _need(gain, facts.min_gain)
    table = [_ranked(name, short, decisive, near, means, chosen, facts) for name in {**short, **finals}]
    return Verdict(
        need=need,
        chosen=chosen,
        best=best,
        gain=gain,
        rows_needed=_rows_needed(gain, facts.min_gain) if need == "undecided" else None,
        table=tuple(sorted(table, key=lambda row: -row.value.mean if row.value else 1 + (row.short_loss or 9e9))),
        decided_by="finalists" if len(finals) > 1 else "short runs",
    )


def _shared(runs: Mapping[str, Sequence[Judged]]) -> dict[str, list[Judged]]:
    """The runs of each candidate that all of them have: what can be compared."""
    keys = set.intersection(*({run.key for run in each} for each in runs.values()))
    return {name: [run for run in each if run.key in keys] for name, each in runs.items()} if keys else {**runs}  # pyright: ignore


def deepest(names: Iterable[str], short: Mapping[str, Sequence[Judged]]) -> list[str]:
    """Those that went beyond the first fold, and the head; all of them where none did."""
    most = max((len(runs) for name, runs in short.items() if name != HEAD), default=0)
    return [name for name in names if name == HEAD or len(short[name]) > 1 or most < 2]


def gains(short: Mapping[str, Sequence[Judged]]) -> dict[str, float]:
    """Candidate -> how much less is lost than with the head alone, out of fold, on the folds that it was tried on."""
    frozen = {run.key: run for run in short.get(HEAD, ())}
    found = {}
    for name, runs in short.items():
        pairs = [(run, frozen[run.key]) for run in runs if run.key in frozen]
        if name != HEAD and pairs:
            found[name] = float(np.concatenate([head.losses - run.losses for run, head in pairs]).mean())
    return found


def _as_good(best: Sequence[Judged], other: Sequence[Judged], facts: Facts) -> bool:
    """Whether the best is no more than one standard error of their difference ahead."""
    ahead = difference(best, other, facts.metric, facts.seed)
    return ahead is not None and ahead.mean <= ahead.error


def _price(name: str, facts: Facts) -> tuple[float, int, bool]:
    """Cheaper steps first, then fewer parameters, then what is contiguous with the top."""
    return round(facts.work[name], 3), facts.sizes[name], not facts.candidates[name].top


def _need(gain: Interval | None, min_gain: float) -> Need:
    if gain is None:
        return "not measurable"
    if gain.low > min_gain:
        return "yes"
    return "no" if gain.high < min_gain else "undecided"


def _rows_needed(gain: Interval | None, min_gain: float) -> int | None:
    """Rows that would bring the interval off `min_gain`, were the difference what it seems to be."""
    if gain is None or gain.mean == min_gain:
        return None
    return ceil(gain.rows * (NORMAL * gain.error / abs(gain.mean - min_gain)) ** 2)


def _ranked(
    name: str,
    short: Mapping[str, Sequence[Judged]],
    decisive: Mapping[str, Sequence[Judged]],
    near: set[str],
    means: Mapping[str, Interval],
    chosen: str,
    facts: Facts,
) -> Ranked:
    runs, tried = decisive.get(name, ()), short.get(name, ())
    timed = [run for run in (*runs, *tried) if run.steps]
    seconds = sum(run.seconds for run in timed) / sum(run.steps for run in timed) if timed else None
    gained = name != HEAD and HEAD in decisive and runs
    return Ranked(
        candidate=facts.candidates[name],
        short_loss=loss(tried) if tried else None,
        value=means.get(name),
        gain=difference(runs, decisive[HEAD], facts.metric, facts.seed) if gained else None,
        against=difference(runs, decisive[chosen], facts.metric, facts.seed) if runs and name != chosen else None,
        near=name in near,
        work=facts.work[name],
        seconds=seconds,
        size=facts.sizes[name],
        rate=next((run.rate for run in (*runs, *tried)), None) if name != HEAD else None,
    )


def agreement(scores: Mapping[str, float], losses: Mapping[str, float]) -> float | None:
    """Rule D4: Spearman's rank correlation of a score with how little loss was left; None below four units."""
    names = [name for name in scores if name in losses]
    if len(names) < 4:
        return None
    one, other = (_ranks([each[name] for name in names]) for each in (scores, {n: -losses[n] for n in names}))
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks, ties sharing theirs."""
    given = np.array(values, dtype=float)
    return np.array([(given < each).sum() + ((given == each).sum() - 1) / 2 for each in given], dtype=float)
