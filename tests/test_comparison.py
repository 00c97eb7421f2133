"""How sure a compared metric is: intervals that hold what they promise, none where the counts tell another story."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from engine.reporting import comparison

COUNTS = [[30, 4, 0], [6, 20, 3], [0, 2, 5]]


def rows(counts: list[list[int]]) -> tuple[list[int], list[int]]:
    cells = [(i, j) for i, row in enumerate(counts) for j, count in enumerate(row) for _ in range(count)]
    return [true for true, _ in cells], [taken for _, taken in cells]


def macro(true: object, taken: object) -> float:
    return float(f1_score(true, taken, average="macro", zero_division=0))


def test_accuracy_has_wilsons_interval() -> None:
    low, high = comparison.interval(COUNTS, "accuracy", 55 / 70) or (0, 0)
    share, z, n = 55 / 70, 1.959964, 70
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx(((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)))
    assert comparison.interval([[9, 0], [0, 9]], "accuracy", 1.0) == pytest.approx((0.824, 1.0), abs=1e-3)


@pytest.mark.parametrize("counts", [COUNTS, [[3, 0, 1], [0, 0, 0], [2, 0, 4]], [[5, 0], [5, 0]]])
def test_f1_is_scikit_learns(counts: list[list[int]]) -> None:
    assert comparison._f1(np.asarray(counts)) == pytest.approx(macro(*rows(counts)))
    low, high = comparison.interval(counts, "f1", macro(*rows(counts))) or (0, 0)
    assert low <= macro(*rows(counts)) <= high


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_an_interval_covers_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 splits of 120 rows from one population, the truth lies in about 95% of the intervals."""
    shares = np.asarray(COUNTS) / np.sum(COUNTS)
    measure = {"accuracy": lambda table: float(np.trace(table) / table.sum()), "f1": comparison._f1}[name]
    monkeypatch.setattr(comparison, "DRAWS", 100)
    draw, held = np.random.default_rng(5), 0
    for _ in range(100):
        counts = draw.multinomial(120, shares.ravel()).reshape(3, 3)
        low, high = comparison.interval(counts.tolist(), name, measure(counts)) or (1, 0)
        held += low <= measure(shares) <= high
    assert 0.88 <= held / 100 <= 0.99


@pytest.mark.parametrize(
    ("counts", "name", "value"),
    [(COUNTS, "accuracy", 0.5), (COUNTS, "f1", 0.5), (COUNTS, "loss", 0.5), ([[0, 0], [0, 0]], "accuracy", 0.0)],
)
def test_counts_that_tell_another_story_give_none(counts: list[list[int]], name: str, value: float) -> None:
    assert comparison.interval(counts, name, value) is None
