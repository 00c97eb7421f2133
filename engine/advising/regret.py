"""How good advice was: hits on planted damage, and regret against every candidate trained in full. Pure arithmetic.

The best of many is best by luck as well, so who was best is asked of some seeds and half of the test rows, and what
that was worth of the others (cross-fitting). A regret can be negative: better than what seemed best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Truth = Mapping[str, np.ndarray]
"""Candidate -> whether each test row was right under each seed (seeds, rows)."""
Pick = Callable[[int], str]
"""The candidate that someone picks who has seen one seed."""


@dataclass(frozen=True)
class Regret:
    """Accuracy that a pick falls short of the best candidate by."""

    mean: float
    error: float
    """Standard error over test rows."""


def regret(truth: Truth, picked: Sequence[str]) -> Regret:
    """Cross-fitted regret of picks, one for each of those who picked, averaged over them."""
    parts = [_fitted(truth, each) for each in picked]
    rows = np.mean(parts, axis=0)
    return Regret(float(rows.mean()), float(rows.std(ddof=1) / np.sqrt(len(rows))))


def _fitted(truth: Truth, picked: str) -> np.ndarray:
    """How much more often each row is right with what seemed best on the other half and the other seeds (rows,)."""
    seeds, rows = next(iter(truth.values())).shape
    halves = [np.arange(rows) % 2 == side for side in (0, 1)]
    lost = np.zeros(rows)
    turns = 0
    for size in {1, seeds - 1} - {0}:
        for chosen in combinations(range(seeds), size):
            rest = [seed for seed in range(seeds) if seed not in chosen] or list(chosen)
            turns += 1
            for seen in halves:
                best = max(truth, key=lambda name: float(truth[name][list(chosen)][:, seen].mean()))
                lost[~seen] += (truth[best][rest][:, ~seen] - truth[picked][rest][:, ~seen]).mean(0)
    return lost / max(1, turns)


def accuracy(truth: Truth, name: str) -> float:
    """Test accuracy of a candidate over all seeds."""
    return float(truth[name].mean())


def gain(truth: Truth, name: str, over: str) -> tuple[float, float]:
    """How much better one candidate is than another on the test rows, and the standard error over rows."""
    rows = (truth[name] - truth[over]).mean(0)
    return float(rows.mean()), float(rows.std(ddof=1) / np.sqrt(len(rows)))


def brier(told: Sequence[tuple[float, bool]]) -> float:
    """Mean squared error of the shares that were told that unfreezing gains anything."""
    return float(np.mean([(share - happened) ** 2 for share, happened in told]))


def hits(ranked: Sequence[Sequence[str]], right: Sequence[Sequence[str]], most: int) -> float:
    """Share of cases in which a right unit is among the first `most`."""
    return float(
        np.mean([any(unit in good for unit in order[:most]) for order, good in zip(ranked, right, strict=True)])
    )
