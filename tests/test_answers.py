"""Decision rules on runs that are made up so that the answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from engine.advising import answers, regret, scorecard
from engine.advising.answers import Facts, Judged, Metric
from engine.advising.budget import Budget, Clock
from engine.advising.units import EVERYTHING, HEAD, Candidate
from engine.errors import RunError

LABELS = np.arange(400) % 4
METRIC = Metric("accuracy", LABELS, 4)


def runs(name: str, right: float, seeds: Sequence[int] = (0, 1), noise: int = 0) -> list[Judged]:
    """Runs of a candidate that has `right` of its rows right: the same ones for every candidate with as many."""
    found = []
    for fold in seeds:
        rows = np.arange(fold * 200, (fold + 1) * 200)
        order = np.random.default_rng(fold + noise).permutation(200)
        wrong = order[int(right * 200) :]
        predicted = LABELS[rows].copy()
        predicted[wrong] = (predicted[wrong] + 1) % 4
        losses = np.where(predicted == LABELS[rows], 0.1, 2.0)
        found.append(Judged(name, fold, fold, 1e-4, 10, tuple(rows.tolist()), losses, predicted, 1.0))
    return found


def facts(**work: float) -> Facts:
    named = {name.replace("_", " "): share for name, share in {"head": 0.01, **work}.items()}
    tried = {name: Candidate(name, (), (), top=name.startswith("top")) for name in named}
    return Facts(tried, named, {name: int(1000 * share) for name, share in named.items()}, METRIC, 0.005, 0)


def test_a_clear_gain_is_a_yes_and_the_smallest_as_good_is_chosen() -> None:
    finals = {HEAD: runs(HEAD, 0.6), "top 1": runs("top 1", 0.9), EVERYTHING: runs(EVERYTHING, 0.905, noise=3)}
    found = answers.decide({}, finals, facts(top_1=0.2, everything=1.0))
    assert (found.need, found.best, found.chosen) == ("yes", EVERYTHING, "top 1")
    assert found.gain is not None
    assert found.gain.low > 0.2
    assert found.gain.mean == pytest.approx(0.305)
    assert [row.candidate.name for row in found.table] == [EVERYTHING, "top 1", HEAD]
    assert [row.near for row in found.table] == [True, True, False]


def test_no_gain_is_a_no() -> None:
    finals = {HEAD: runs(HEAD, 0.9), "top 1": runs("top 1", 0.8)}
    found = answers.decide({}, finals, facts(top_1=0.2))
    assert (found.need, found.chosen) == ("no", HEAD)


def test_a_small_gain_is_undecided_and_says_how_many_rows_would_settle_it() -> None:
    finals = {HEAD: runs(HEAD, 0.80), "top 1": runs("top 1", 0.82, noise=7)}
    found = answers.decide({}, finals, facts(top_1=0.2))
    assert found.need == "undecided"
    assert found.chosen == HEAD
    assert found.rows_needed is not None
    assert found.rows_needed > 400


def test_short_runs_decide_where_there_are_no_whole_ones() -> None:
    short = {HEAD: runs(HEAD, 0.6), "top 1": runs("top 1", 0.9)}
    found = answers.decide(short, {}, facts(top_1=0.2))
    assert (found.decided_by, found.chosen) == ("short runs", "top 1")
    alone = answers.decide({HEAD: runs(HEAD, 0.6)}, {}, facts())
    assert (alone.need, alone.chosen) == ("not measurable", HEAD)


def test_who_was_beaten_on_the_first_fold_is_not_compared_on_it_alone() -> None:
    lucky = runs(EVERYTHING, 1.0, seeds=[0])
    found = answers.decide(
        {HEAD: runs(HEAD, 0.6), "top 1": runs("top 1", 0.9), EVERYTHING: lucky}, {}, facts(top_1=0.2, everything=1.0)
    )
    assert found.chosen == found.best == "top 1"
    assert {row.candidate.name for row in found.table} == {HEAD, "top 1", EVERYTHING}
    assert {row.value.rows for row in found.table if row.value} == {400}


def test_only_shared_runs_are_compared() -> None:
    finals = {HEAD: runs(HEAD, 0.6), "top 1": runs("top 1", 0.9), EVERYTHING: runs(EVERYTHING, 0.9, seeds=[0])}
    found = answers.decide({}, finals, facts(top_1=0.2, everything=1.0))
    assert {row.value.rows for row in found.table if row.value} == {200}


def test_intervals_hold_what_they_promise() -> None:
    """Of many draws of 300 rows whose true difference is known, about 95 % of the intervals hold it."""
    draw, held = np.random.default_rng(5), 0
    for _ in range(60):
        made: dict[str, list[Judged]] = {"a": [], "b": []}
        for fold in range(2):
            rows = np.arange(fold * 150, (fold + 1) * 150)
            for name, share in (("a", 0.8), ("b", 0.7)):
                predicted = np.where(draw.random(150) < share, LABELS[rows], (LABELS[rows] + 1) % 4)
                made[name].append(Judged(name, fold, fold, 0, 1, tuple(rows.tolist()), np.zeros(150), predicted))
        found = answers.difference(made["a"], made["b"], METRIC)
        assert found is not None
        held += found.low <= 0.1 <= found.high
    assert 52 <= held <= 60


def test_another_metric_is_computed_anew_for_each_resample() -> None:
    found = answers.value(runs(HEAD, 0.75), Metric("f1", LABELS, 4))
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(0.75, abs=0.02)
    assert answers.usable("roc_auc") == "accuracy"
    assert answers.usable("f1") == "f1"


def test_too_few_rows_are_not_enough() -> None:
    assert not answers.enough(np.arange(99) % 2)
    assert not answers.enough(np.arange(200) % 50)
    assert answers.enough(np.concatenate([np.arange(200) % 4, [9]]))


def test_agreement_is_spearmans() -> None:
    scores = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}
    assert answers.agreement(scores, {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}) == pytest.approx(1.0)
    assert answers.agreement(scores, {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}) == pytest.approx(-1.0)
    assert answers.agreement({"a": 1.0}, {"a": 1.0}) is None


def test_gains_are_paired_with_the_head() -> None:
    short = {HEAD: runs(HEAD, 0.5), "block 0": runs("block 0", 0.7, seeds=[1]), "block 1": runs("block 1", 0.6)}
    found = answers.gains(short)
    assert found["block 0"] == pytest.approx(0.2 * 1.9)
    assert found["block 1"] == pytest.approx(0.1 * 1.9)


@pytest.mark.parametrize(
    ("text", "seconds", "share"), [("90s", 90, None), ("10m", 600, None), ("1.5h", 5400, None), ("25%", None, 0.25)]
)
def test_budgets(text: str, seconds: float | None, share: float | None) -> None:
    assert Budget.read(text) == Budget(seconds, share)


@pytest.mark.parametrize("text", ["", "10", "0m", "ten", "-5s", "10 apples"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(RunError, match="is no time; write `10m`"):
        Budget.read(text)


def test_a_clock_goes_by_what_it_is_told() -> None:
    time = [10.0]
    clock = Clock(seconds=5.0, now=lambda: time[0])
    time[0] = 12.0
    assert (clock.spent, clock.left) == (2.0, 3.0)
    clock.check()
    clock.stopped = True
    assert clock.left == 0.0


def truth(**right: float) -> Mapping[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {name: (draw.random((3, 400)) < share).astype(float) for name, share in right.items()}


def test_regret_of_the_best_is_none_and_of_the_worst_is_the_gap() -> None:
    found = truth(head=0.6, good=0.9)
    assert regret.regret(found, ["good"]).mean == pytest.approx(0.0, abs=1e-9)
    assert regret.regret(found, ["head"]).mean == pytest.approx(0.3, abs=0.05)


def test_regret_is_not_fooled_by_luck() -> None:
    """Among equals the best of one half is best by luck, so nobody regrets any of them."""
    found = truth(**{f"c{index}": 0.7 for index in range(8)})
    assert abs(regret.regret(found, list(found)).mean) < 0.02


def test_the_scorecard_counts_hits_and_failures() -> None:
    line = {"kind": "plant", "strength": 2.0, "scores": {"gsnr": ["block 1", "head"]}, "drop": "block 0", "cpu": 1.0}
    first = {**line, "case": "plant:0", "right": ["block 0"], "units": ["block 0", "block 1"], "folds": 4}
    second = {**line, "case": "plant:1", "right": ["block 1"], "units": ["block 0", "block 1"], "folds": 4}
    said = "\n".join(scorecard.report([first, second, {"case": "plant:2", "error": "it fell"}]))
    assert "| **short runs, out of fold** | 50% | 100% |" in said
    assert "| gsnr | 50% |" in said
    assert "failed: plant:2: it fell" in said
