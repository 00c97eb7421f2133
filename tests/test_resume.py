"""A run that is cut off goes on to the very weights and the very records of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import staged

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has cut off."""
    root = staged.place(tmp_path_factory.mktemp("whole"))
    assert staged.run(root) == [0]
    return root


def same(one: Path, other: Path) -> bool:
    assert staged.history(one) == staged.history(other)
    return staged.equal(staged.weights(one), staged.weights(other))


def test_a_run_tells_every_step_once(whole: Path):
    told = [(event["event"], event.get("stage"), event.get("step")) for event in staged.history(whole)]
    assert len(told) == len(set(told))
    ended = {name: step for kind, name, step in told if kind == "stage_ended"}
    assert ended["top"] < 9, "the third stage is to stop early"
    assert (ended["head"], ended["lora"], ended["all"]) == (3, 4, 4)
    moved = [event for event in staged.history(whole) if event["event"] == "proved"]
    assert moved[0]["moved"] > 50
    assert moved[0]["still"] > 0


@pytest.mark.parametrize("which", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_cut_off_in_every_step_of_every_stage(whole: Path, tmp_path: Path, which: signal.Signals):
    """One run, cut off again and again: a polite signal after each step, a kill in each step after the first."""
    root = staged.fresh(whole, tmp_path, training={**staged.RECIPE["training"], "save_steps": 1})
    cuts, code = 0, -1
    while code:
        (code,) = staged.run(root, plant=staged.signal_at(1 if which == signal.SIGTERM else 2, which))
        assert code in (0, 143 if which == signal.SIGTERM else -which), staged.said(root)
        cuts += code != 0
    assert cuts >= len(staged.steps(whole)) - 5
    assert same(whole, root)


def test_what_early_stopping_knows_survives(whole: Path, tmp_path: Path):
    root = staged.fresh(whole, tmp_path)
    best = [event for event in staged.history(whole) if event["event"] == "evaluated" and event["stage"] == "top"]
    assert [event["best"] for event in best] == [True, False, False]
    begun = 3 + 4 + 5  # between the first evaluation without a gain and the second
    assert staged.run(root, plant=staged.signal_at(begun, signal.SIGKILL)) == [-signal.SIGKILL]
    states = [json.loads(path.read_text()) for path in staged.folder(root).glob("checkpoints/stage-02*/state.json")]
    state = max(states, key=lambda each: each["step"])
    assert state["best"]["stale"] == 1
    assert state["best"]["value"] == best[0]["metrics"]["loss"]
    assert staged.run(root) == [0]
    assert same(whole, root)


def test_half_precision_weights_that_have_trained_come_back_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    stages = [staged.STAGES[0], {"name": "top", "unfreeze": "@blocks[-1:]", "steps": 4, "learning_rate": 1e-3}]
    recipe = {"model": {"path": "model", "dtype": "bfloat16"}, "stages": stages, "cache": "off"}
    plain, cut = (staged.fresh(whole, tmp_path / name, **recipe) for name in ("plain", "cut"))
    assert staged.run(plain) == [0], staged.said(plain)
    assert staged.run(cut, plant=staged.signal_at(6, signal.SIGKILL)) == [-signal.SIGKILL]
    assert staged.run(cut) == [0]
    assert same(plain, cut)


@pytest.mark.parametrize(("size", "exact"), [(8, True), (4, False)])
def test_with_and_without_a_cache(whole: Path, tmp_path: Path, size: int, exact: bool):
    """Equal to the bit, but for products of fewer rows than their kernel takes at once: 1e-7 of a weight at most."""
    off, on = (
        staged.fresh(whole, tmp_path / mode, cache=mode, per_device_batch_size=size, evaluation={"eval_steps": 2})
        for mode in ("off", "auto")
    )
    assert staged.run(off) == staged.run(on) == [0]
    assert "replays" in staged.said(on)
    assert "replays" not in staged.said(off)
    one, other = staged.weights(off), staged.weights(on)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= (0.0 if exact else 1e-7)


def killed_at_random(root: Path, draw: random.Random, kills: int, longest: float) -> int:
    """Kill a run so many times, each time it goes on; how many of these found it still running."""
    hit = 0
    for _ in range(kills):
        (child,) = staged.begin(root)
        time.sleep(draw.uniform(0.3, longest))
        os.kill(child, signal.SIGKILL)
        hit += staged.ends([child]) == [-signal.SIGKILL]
    return hit


@pytest.mark.slow
def test_killed_at_random_three_times_in_each_of_twenty_runs(whole: Path, tmp_path: Path):
    draw, hit, equal = random.Random(7), 0, 0
    began = time.monotonic()
    assert staged.run(staged.fresh(whole, tmp_path / "timed")) == [0]
    longest = time.monotonic() - began
    for number in range(20):
        root = staged.fresh(whole, tmp_path / str(number))
        hit += killed_at_random(root, draw, 3, longest)
        assert staged.run(root) == [0], staged.said(root)
        equal += same(whole, root)
    print(f"{hit}/60 kills hit a run under way; {equal}/20 runs ended with equal weights and records")
    assert equal == 20
    assert hit >= 50


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGKILL])
def test_cut_off_once_at_each_step(whole: Path, tmp_path: Path, which: signal.Signals):
    for step in staged.steps(whole):
        root = staged.fresh(whole, tmp_path / str(step))
        assert staged.run(root, plant=staged.signal_at(step, which)) == [143 if which == signal.SIGTERM else -which]
        assert staged.run(root) == [0], staged.said(root)
        assert same(whole, root), step
