"""Light, real runs: a candidate is entered once, then trained and judged many times from wherever a run is to start.

Every run trains on some rows and is judged, example by example, on others. Weights go back to their start between runs,
so what lies below a frost line is captured once for all of them. Nothing is written but activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from engine import freezing
from engine.advising.answers import Judged
from engine.advising.bench import Bench
from engine.advising.budget import Clock, OutOfTimeError
from engine.advising.units import HEAD, Candidate
from engine.errors import RunError
from engine.randomness import stable_seed

HEAD_RATES = (1e-3, 3e-3, 1e-2)
"""Peak rates that a head is fitted at; the one that is best out of fold serves."""
HEAD_EPOCHS, HEAD_STEPS = 12, (100, 240)
"""Passes over the rows that fit a head, and the least and the most steps of them."""
WARM = 0.1
"""Share of a run's steps in which its rate rises."""
MICRO = 64
"""Most examples judged at once."""

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What one run is."""

    train: np.ndarray
    """Rows it trains on."""
    judge: np.ndarray
    """Rows it is judged on; none of those it trains on."""
    fold: int
    seed: int
    rate: float
    """Peak rate of all but the head."""
    head_rate: float
    steps: int
    """The rate falls to zero over them: a short run whose rate stays is judged in the middle of its wandering."""


class Arm:
    """One candidate, entered."""

    def __init__(self, bench: Bench, candidate: Candidate, clock: Clock):
        self.bench, self.candidate, self.clock = bench, candidate, clock
        self.learner = bench.learner
        self.took: list[float] = []
        """Seconds of each step of its last run."""
        head = {name for unit in bench.units if unit.name == HEAD for name in unit.parameters}
        self.heads = [set(group.parameters) <= head for group in bench.stages[candidate.name].groups]
        """Which of the optimizer's groups hold the head."""

    def run(self, wanted: Run, start: Weights) -> Judged:
        """Train from `start` and judge. Raises `OutOfTimeError` where the budget ends first.

        A run whose gradient is not finite is judged as worthless: its losses are infinite.
        """
        began, broken = self.clock.now(), False
        self._reset(wanted, start)
        self.took = []
        try:
            for step in range(wanted.steps):
                self.clock.check()
                at = self.clock.now()
                self.learner.step(step)
                self.took.append(self.clock.now() - at)
        except RunError:
            broken = True
            self.learner.optimizer.zero_grad(set_to_none=True)
        self.learner.taken_loss()
        losses, predicted = self.judge(wanted.judge)
        return Judged(
            candidate=self.candidate.name,
            fold=wanted.fold,
            seed=wanted.seed,
            rate=wanted.rate,
            steps=wanted.steps,
            rows=tuple(wanted.judge.tolist()),
            losses=np.full(len(losses), np.inf) if broken else losses,
            predicted=predicted,
            seconds=self.clock.now() - began,
        )

    def _reset(self, wanted: Run, start: Weights) -> None:
        """Weights, optimizer, rates and order as they are before step 1."""
        learner, moving = self.learner, freezing.movable(self.learner.model)
        tensors = learner.tensors()
        for name in moving:
            tensors[name].data.copy_(start.get(name, self.bench.start[name]))
        optimizer = learner.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.optimizer.state.clear()
        for group, head in zip(optimizer.param_groups, self.heads, strict=True):
            group["peak"] = wanted.head_rate if head else wanted.rate
        seed = stable_seed(self.bench.recipe.seed, "trial", wanted.seed, wanted.fold)
        learner.recipe = self.bench.recipe.model_copy(update={"seed": seed})
        learner.chosen, learner.dice, learner.epoch = wanted.train, (seed, "order"), -1
        warm = max(1, round(WARM * wanted.steps))
        learner.share = lambda step: _share(step, warm, wanted.steps)

    def judge(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood of each row's label, and the class that the model takes it for: both (rows,)."""
        learner, split = self.learner, self.learner.data.train
        by_length = np.arange(len(rows)) if split.lengths is None else np.argsort(split.lengths[rows], kind="stable")
        losses, predicted = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
        with freezing.eval_mode(learner.model):
            for first in range(0, len(rows), MICRO):
                places = by_length[first : first + MICRO]
                chunk = rows[places].tolist()
                batch = learner.collated(split, chunk)
                learner.shortcut.feed(split, chunk, batch)
                with learner.accelerator.autocast():
                    outputs = learner.task.forward(learner.model, batch)
                logits = np.asarray(learner.task.answers(outputs, batch)[0], dtype=np.float64)
                losses[places] = _log_loss(logits, self.bench.labels[chunk])
                predicted[places] = logits.argmax(axis=1)
        return losses, predicted


@contextmanager
def entered(bench: Bench, candidate: Candidate, clock: Clock, ahead: Sequence[Candidate] = ()) -> Iterator[Arm]:
    """The candidate's arm; afterwards every weight is as it was loaded.

    What lies below the frost lines of the candidates `ahead`, from the top down, is captured in the same pass.
    """
    learner = bench.learner
    learner.moments = {}
    learner.recipe = bench.recipe
    learner.chosen = np.arange(bench.rows)
    learner.enter(bench.stages[candidate.name], ahead=[bench.stages[each.name] for each in ahead])
    try:
        yield Arm(bench, candidate, clock)
    finally:
        moved = {name: bench.start[name] for name in freezing.movable(learner.model)}
        learner.leave()
        learner.restore(moved)


@dataclass(frozen=True)
class Head:
    """A head that has been fitted to the rows of all folds but one, on frozen features."""

    weights: Weights
    judged: Judged


Split = tuple[np.ndarray, np.ndarray]
"""Rows to train on, and rows to judge by."""


def fit_heads(
    bench: Bench, splits: Sequence[Split], clock: Clock, ahead: Sequence[Candidate] = ()
) -> tuple[list[Head], float]:
    """A head for each split, and the rate that they were fitted at: the best of three on the first one.

    It is what linear probing does with the model's own head, whatever that is made of. Where the budget ends on the
    way there are fewer heads than splits, and at least one.
    """
    heads: list[Head] = []
    with entered(bench, bench.candidates[HEAD], clock, ahead) as arm, suppress_end(heads):
        for number, (train, judge) in enumerate(splits):
            steps = head_steps(len(train), bench.recipe.batch_size)
            tried: list[tuple[float, Head]] = []
            for rate in HEAD_RATES if not heads else (heads[0].judged.rate,):
                judged = arm.run(Run(train, judge, number, number, rate, rate, steps), bench.start)
                tried.append((float(judged.losses.mean()), Head(bench.learner.snapshot(), judged)))
            heads.append(min(tried, key=lambda pair: pair[0])[1])
    return heads, heads[0].judged.rate


def head_steps(rows: int, batch_size: int) -> int:
    """Steps that fit a head to so many rows."""
    least, most = HEAD_STEPS
    return min(most, max(least, HEAD_EPOCHS * -(-rows // batch_size)))


def splits(folds: Sequence[np.ndarray]) -> list[Split]:
    """For each fold the rows of all others, and its own."""
    everyone = np.sort(np.concatenate(list(folds)))
    return [(np.setdiff1d(everyone, held), held) for held in folds]


@contextmanager
def suppress_end(found: Sequence[object]) -> Iterator[None]:
    """Inside, the end of the budget ends the work, unless nothing has been found yet."""
    try:
        yield
    except OutOfTimeError:
        if not found:
            raise


def folds(labels: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Rows (indices, in order) of `count` folds, each class spread over them as evenly as can be."""
    draw, place = np.random.default_rng(stable_seed(seed, "folds")), 0
    fold = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        fold[rows] = (np.arange(len(rows)) + place) % count
        place += len(rows)
    return [np.flatnonzero(fold == index) for index in range(count)]


def _share(step: int, warm: int, length: int) -> float:
    """Share of the peak rate at a step: up in a line, then down in a line to zero at `length`."""
    if step < warm:
        return (step + 1) / warm
    return max(0.0, (length - step) / max(1, length - warm))


def _log_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    raised = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(raised).sum(axis=1))
    losses = total - raised[np.arange(len(labels)), labels]
    return np.where(np.isfinite(losses), losses, np.inf)
