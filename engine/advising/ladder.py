"""The ladder of advice: what a step costs, what can be read off, how the loss pulls, short runs, whole runs. Each rung
says what it cost, and any of them may be the last.

Signals propose and explain; real runs on the user's own rows decide, judged on rows that they didn't train on. What the
budget has no room for is dropped in an order that is fixed, and told. The test split is never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from engine.advising import answers, readings, trials
from engine.advising.advice import Advice, Rung
from engine.advising.answers import Judged
from engine.advising.bench import Bench
from engine.advising.budget import FINALISTS, Budget, Clock, OutOfTimeError
from engine.advising.trials import Head, Run, entered
from engine.advising.units import EVERYTHING, HEAD, Candidate, anchor, window

FOLDS = 4
SHORT = (16, 24)
"""Least and most steps of a short run; one pass over the rows where that lies between."""
SCANT = 0.4
"""Share of what is left that short runs get where the rungs before them have taken half of the budget already."""
FASTER = (1.0, 3.0)
"""Rates of a short run, as multiples of the recipe's own; the last is tried again as long as it wins."""
MOST_RATES = 3


@dataclass
class Ladder:
    """Advice in the making."""

    bench: Bench
    clock: Clock
    budget: Budget
    advice: Advice
    finalists: float = FINALISTS
    """Share of the budget that whole runs get at least; without any, short runs are the last rung."""

    def __post_init__(self) -> None:
        self.seed = self.advice.seed
        self.folds = trials.folds(self.bench.labels, FOLDS, self.seed)
        self.heads: list[Head] = []
        self.rates: dict[str, float] = {}
        """Candidate -> the rate that was best for it."""
        self.costs: dict[str, float] = {}
        """Candidate -> seconds of a step and its share of judging, as measured."""
        self.tried = 1
        """Rates that the last candidate was tried at."""
        self.entering = 0.0
        """Seconds that entering a candidate has taken at most."""

    def climb(self) -> Iterator[Rung]:
        """Rung by rung, until the answer is there or the budget is spent."""
        measurable = self.advice.measurable = answers.enough(self.bench.labels)
        if not measurable:
            self.advice.notes.append("too few rows to measure differences: no runs were made")
        steps = [self.price, self.read, self.pull] + [self.short] * measurable
        steps += [self.full, self.when] if measurable and self.finalists else []
        for rung in steps:
            began, said = self.clock.now(), []
            try:
                said = rung()
            except OutOfTimeError:
                why = "stopped as asked" if self.clock.stopped else "the budget was spent"
                self.advice.dropped.append(f"{TITLES[rung.__name__]}: not finished, {why}")
            self._decide()
            self.advice.spent, self.advice.stopped = self.clock.spent, self.clock.stopped
            yield self._done(TITLES[rung.__name__], self.clock.now() - began, said)
            if self.clock.left <= 0:
                break

    def _done(self, name: str, seconds: float, said: Sequence[str]) -> Rung:
        self.advice.rungs.append(Rung(name, seconds, tuple(said)))
        return self.advice.rungs[-1]

    # Rung 0

    def price(self) -> list[str]:
        """What a step costs that trains everything; that of the others follows from their FLOPs until it's measured."""
        bench = self.bench
        with entered(bench, bench.candidates[EVERYTHING], self.clock) as arm:
            rows = np.arange(bench.rows)
            arm.run(Run(rows, rows[:0], 0, self.seed, bench.rate, trials.HEAD_RATES[0], 4), bench.start)
        step = sorted(arm.took[1:])[1]  # the first one warms up
        self.advice.step_seconds = step
        full = step * bench.steps
        if self.budget.share is not None:
            self.clock.seconds = self.budget.share * full
        shares = ", ".join(
            f"{name} {bench.stages[name].cached_cost:.0%}"
            for name in (HEAD, *self._tops(), "all blocks")
            if name in bench.stages
        )
        return [
            f"{len(bench.units)} units: {', '.join(f'{u.name} {u.size:,}' for u in bench.units)}",
            f"a step that trains everything takes {step:.3f} s, {bench.steps} of them {full:,.0f} s; "
            f"with what is frozen replayed: {shares}",
        ]

    def _tops(self) -> list[str]:
        return [name for name, each in self.bench.candidates.items() if name.startswith("top ")]

    # Rungs 1 and 2

    def read(self) -> list[str]:
        """One forward pass, kept; the head fitted to it in each fold, and probes of every layer with their controls."""
        bench, advice = self.bench, self.advice
        stacked = [each for each in bench.candidates.values() if len(each.units) == 1 and each.name != "embeddings"]
        self.heads, advice.head_rate = trials.fit_heads(bench, trials.splits(self.folds), self.clock, stacked[::-1])
        advice.short[HEAD] = [head.judged for head in self.heads]
        frozen = answers.value(advice.short[HEAD], self.metric, self.seed)
        said = f"the head alone, fitted at {advice.head_rate:g}: {self.metric.name} {_percent(frozen)}"
        return [said, *readings.probes(bench, advice, self.folds, self.clock)]

    def pull(self) -> list[str]:
        """One backward pass at the fitted head, and every signal; they explain, and propose one pair of neighbours."""
        said = readings.scores(self.bench, self.advice, self.heads[0].weights, self.folds, self.clock)
        if pair := readings.proposed(self.bench, self.advice):
            self.bench.add(window(self.bench.units, pair))
        return said

    # Rung 3

    def short(self) -> list[str]:
        """Every candidate for a few steps from the fitted head, judged out of fold."""
        epoch = -(-self.bench.rows * (FOLDS - 1) // FOLDS // self.bench.recipe.batch_size)
        steps = self.advice.short_steps = min(max(SHORT[0], epoch), SHORT[1])
        half = self.clock.seconds * (1 - self.finalists)
        until = max(half, self.clock.spent + SCANT * self.clock.left)
        tried, rates = self._affordable(steps, until - self.clock.spent)
        for place, each in enumerate(tried):
            if self.clock.spent > until and self.advice.short.keys() - {HEAD}:
                self.advice.dropped.append(f"short runs of {each.name}: no time")
                continue
            began = self.clock.now()
            with self._enter(each) as arm:
                self._pilot(arm, steps, rates)
                self.entering = max(
                    self.entering, self.clock.now() - began - self.tried * self.costs[each.name] * steps
                )
                if self._all_folds_fit(tried[place:], steps, until):
                    self._more_folds(arm, steps, len(self.heads))
        self._deepen([each for each in tried if each.name in self.rates], steps, until)
        found = answers.gains(self.advice.short)
        for name, scores in self.advice.scores.items():
            singles = {unit: found[unit] for unit in scores if unit in found}
            self.advice.agreement[name] = answers.agreement(scores, {u: -g for u, g in singles.items()})
        best = sorted(found, key=lambda name: -found[name])
        return [
            f"{len(found)} candidates, {steps} steps each, on {max(map(len, self.advice.short.values()))} folds",
            "loss out of fold, less than with the head alone: " + ", ".join(f"{n} {found[n]:+.3f}" for n in best[:6]),
        ]

    def _affordable(self, steps: int, seconds: float) -> tuple[list[Candidate], tuple[float, ...]]:
        """The candidates to try and the rates to try them at, as far as there is time: folds come last."""
        tried = [each for each in self.bench.candidates.values() if each.name != HEAD]
        tried.sort(key=lambda each: self.bench.stages[each.name].cached_cost)
        if self._foreseen(tried, steps) * len(FASTER) <= seconds:
            return tried, FASTER
        self.advice.dropped.append(f"short runs at {FASTER[-1]:g} times the recipe's rate")
        lower = [each for each in tried if len(each.units) == 1 and each.name not in self.advice.suspects()][::-1]
        lower = sorted(lower, key=lambda each: -self.bench.stages[each.name].cached_cost)
        while lower and len(lower) * 2 > len(tried) // 2 and self._foreseen(tried, steps) > seconds and len(tried) > 4:
            tried.remove(gone := lower.pop(0))
            self.advice.dropped.append(f"short runs of {gone.name}, which costs as much as the layers above it")
        return tried, FASTER[:1]

    def _foreseen(self, tried: Sequence[Candidate], steps: int) -> float:
        """Seconds that one short run of each would take, by FLOPs."""
        judged = self.bench.rows / FOLDS / self.bench.recipe.batch_size / 3
        whole = self.advice.step_seconds or 0.0
        stages = [self.bench.stages[each.name] for each in tried]
        return sum(whole * (3 + steps * max(0.05, s.cached_cost) + judged * (1 - s.below)) for s in stages)

    def _enter(self, candidate: Candidate) -> AbstractContextManager[trials.Arm]:
        return entered(self.bench, candidate, self.clock)

    def _pilot(self, arm: trials.Arm, steps: int, rates: Sequence[float]) -> None:
        """The first fold, at the recipe's rate and at faster ones as long as they are better."""
        name, tried = arm.candidate.name, list[tuple[float, float, Judged]]()
        for turn in range(MOST_RATES if len(rates) > 1 else 1):
            rate = self.bench.rate * FASTER[1] ** turn
            judged = arm.run(self._run(0, rate, steps), self.heads[0].weights)
            self.costs[name] = judged.seconds / steps
            tried.append((float(judged.losses.mean()), rate, judged))
            self.tried = len(tried)
            if turn and tried[-1][0] >= tried[-2][0]:
                break
        _, self.rates[name], best = min(tried, key=lambda each: each[:2])
        self.advice.short[name] = [best]

    def _all_folds_fit(self, left: Sequence[Candidate], steps: int, until: float) -> bool:
        """Whether all candidates from this one on can be tried on all folds, going by what it took itself.

        Then that is done while they are entered, which costs as much as a short run or two.
        """
        mine = left[0].name
        ratio = self.costs[mine] * steps / max(self._foreseen(left[:1], steps), 1e-9)
        runs = self.tried + len(self.heads) - 1
        later = sum(ratio * runs * self._foreseen([each], steps) + self.entering for each in left[1:])
        return later + (len(self.heads) - 1) * self.costs[mine] * steps < 0.9 * (until - self.clock.spent)

    def _more_folds(self, arm: trials.Arm, steps: int, most: int) -> None:
        """The folds up to `most` that a candidate hasn't been tried on, at the rate that was best on the first."""
        name = arm.candidate.name
        for fold in range(len(self.advice.short[name]), most):
            judged = arm.run(self._run(fold, self.rates[name], steps), self.heads[fold].weights)
            self.advice.short[name].append(judged)

    def _deepen(self, tried: Sequence[Candidate], steps: int, until: float) -> None:
        """More folds for the better half of those that were tried on the first alone, and for what is suspected.

        As many folds as there is time for, the same for all of them (successive halving, Jamieson & Talwalkar 2016).
        """
        found = answers.gains(self.advice.short)
        behind = [each for each in tried if len(self.advice.short[each.name]) < len(self.heads)]
        behind.sort(key=lambda each: (each.name not in self.advice.suspects(), -found[each.name]))
        if behind[(half := -(-len(behind) // 2)) :]:
            self.advice.dropped.append(f"more than one fold for {', '.join(each.name for each in behind[half:])}")
        behind = behind[:half]
        more = len(self.heads) - 1
        one = sum(self.costs[each.name] * steps for each in behind)
        room = until - self.clock.spent - self.entering * len(behind)
        fits = min(more, int(max(0.0, room) / one)) if one else more
        if fits < more:
            self.advice.dropped.append(f"short runs on {more - fits} of {len(self.heads)} folds")
        for each in behind if fits else ():
            with self._enter(each) as arm:
                self._more_folds(arm, steps, fits + 1)

    def _run(self, fold: int, rate: float, steps: int, head_rate: float | None = None) -> Run:
        """A run from a fitted head, which moves no faster than the rest: faster, it unlearns what fitted it."""
        held = self.folds[fold]
        train = np.setdiff1d(np.arange(self.bench.rows), held)
        return Run(train, held, fold, fold, rate, head_rate or rate, steps)

    # Rung 4

    def full(self) -> list[str]:
        """The two best, the first suspect and the anchors at full length, on as many folds as there is time for."""
        found = answers.gains(self.advice.short)
        if not found:
            raise OutOfTimeError
        wanted = sorted(answers.deepest(found, self.advice.short), key=lambda name: -found[name])[:2]
        wanted += [name for name in self.advice.suspects()[:1] if name in found and name not in wanted]
        top = anchor([each for each in self.bench.candidates.values() if each.name in found])
        wanted += [
            name for name in (top.name if top else HEAD, EVERYTHING) if name not in (*wanted, HEAD) and name in found
        ]
        names, folds, steps = self._fitting(wanted)
        self.advice.steps = steps
        for fold in range(folds):
            for name in names:
                if self._over(name, steps):
                    raise OutOfTimeError
                with self._enter(self.bench.candidates[name]) as arm:
                    judged = arm.run(self._run(fold, self.rates[name], steps), self.heads[fold].weights)
                self.advice.finals.setdefault(name, []).append(judged)
                self.costs[name] = judged.seconds / steps
            self.advice.finals.setdefault(HEAD, []).append(self.heads[fold].judged)
        return [
            f"{name}: {self.metric.name} {_percent(answers.value(runs, self.metric))}"
            for name, runs in self.advice.finals.items()
        ]

    def _over(self, name: str, steps: int) -> bool:
        """Whether one more whole run would go beyond the budget."""
        return self.costs[name] * steps > self.clock.left * 1.1

    def _fitting(self, wanted: list[str]) -> tuple[list[str], int, int]:
        """Which finalists, on how many folds, for how many steps: what the time left allows, dropped in this order."""
        whole = max(1, round(self.bench.steps * (FOLDS - 1) / FOLDS))
        least = min(whole, 2 * self.advice.short_steps)
        lengths = sorted(
            {whole, max(least, whole * 2 // 3), max(least, whole // 2), max(least, whole // 3), least}, reverse=True
        )
        names, folds = list(wanted), len(self.heads)

        def takes(steps: int) -> float:
            return folds * sum(self.costs[name] * steps for name in names)

        while folds > 2 and takes(whole) > self.clock.left:
            folds -= 1
        steps = next((each for each in lengths if takes(each) <= self.clock.left), lengths[-1])
        while len(names) > 1 and takes(steps) > self.clock.left:
            self.advice.dropped.append(f"whole runs of {names.pop()}")
        if folds < len(self.heads):
            self.advice.dropped.append(f"whole runs on {len(self.heads) - folds} of {len(self.heads)} folds")
        if steps < whole:
            self.advice.dropped.append(f"whole runs are cut to {steps} of {whole} steps")
        return names, folds, steps

    def when(self) -> list[str]:
        """The chosen candidate once more, from the head as it was loaded: what is fitting it first worth?"""
        verdict = self.advice.verdict
        if verdict is None or verdict.chosen not in self.advice.finals or verdict.chosen == HEAD:
            return []
        chosen, steps = verdict.chosen, self.advice.steps
        at_once: list[Judged] = []
        with self._enter(self.bench.candidates[chosen]) as arm:
            for run in self.advice.finals[chosen]:
                if self._over(chosen, steps):
                    break
                at_once.append(
                    arm.run(self._run(run.fold, self.rates[chosen], steps, self.advice.head_rate), self.bench.start)
                )
        if not at_once:
            self.advice.dropped.append("whether the head should come first: no time")
            return []
        self.advice.when = answers.difference(self.advice.finals[chosen], at_once, self.metric, self.seed)
        assert self.advice.when is not None
        return [f"fitting the head first: {_points(self.advice.when)} {self.metric.name} for {chosen}"]

    # Deciding

    @property
    def metric(self) -> answers.Metric:
        return answers.Metric(self.advice.metric, self.bench.labels, self.advice.classes)

    def _decide(self) -> None:
        advice, bench = self.advice, self.bench
        if not advice.short.get(HEAD):
            return
        sizes = {name: stage.size for name, stage in bench.stages.items()}
        work = {name: stage.cached_cost for name, stage in bench.stages.items()}
        facts = answers.Facts(bench.candidates, work, sizes, self.metric, advice.min_gain, self.seed)
        advice.verdict = answers.decide(advice.short, advice.finals, facts)


TITLES = {
    "price": "what a step costs",
    "read": "what can be read off",
    "pull": "how the loss pulls",
    "short": "short runs",
    "full": "whole runs",
    "when": "head first, or all at once",
}
"""The rungs, as a user is told of them."""


def begin(bench: Bench, recipe: str, budget: Budget, clock: Clock, seed: int = 0, min_gain: float = 0.005) -> Ladder:
    """The ladder for a bench, at its foot; `min_gain` is the gain in the metric that unfreezing has to be worth."""
    metric = answers.usable(bench.metric)
    advice = Advice(
        recipe=recipe,
        architecture=bench.outline.architecture,
        metric=metric,
        rows=bench.rows,
        available=bench.available,
        classes=len(bench.facts.labels),
        folds=FOLDS,
        seed=seed,
        budget=budget.said,
        min_gain=min_gain,
        steps=bench.steps,
        short_steps=SHORT[0],
        batch_size=bench.recipe.batch_size,
        units=bench.units,
        notes=list(bench.notes),
    )
    if metric != bench.metric:
        advice.notes.append(f"`{bench.metric}` needs more than the class a row is taken for; accuracy decides here")
    clock.seconds = budget.seconds or clock.seconds
    return Ladder(bench, clock, budget, advice)


def _percent(found: answers.Interval) -> str:
    return f"{found.mean:.1%} ± {answers.NORMAL * found.error:.1%}"


def _points(found: answers.Interval) -> str:
    return f"{100 * found.mean:+.1f} points, [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
