"""The whole ladder on a tiny model: an answer within any budget, the same for the same seed, no test row ever read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from engine import advise
from engine.advising import ladder, trials
from engine.advising.advice import Advice, Rung
from engine.advising.answers import Judged
from engine.advising.budget import Budget
from engine.advising.units import EVERYTHING, HEAD, anchor, candidates, units, window
from engine.cli import main
from engine.errors import PlanError
from engine.load import load
from engine.outline import Outline, Parameter

RECIPE = """
model: model
task: text-classification
data: {path: json, data_files: {train: train.jsonl, test: test.jsonl}, splits: {test: test}}
freeze: bert
stages:
  - {name: head, epochs: 1, learning_rate: 1e-2}
  - {name: all, unfreeze: bert, epochs: 1, learning_rate: 1e-2}
batch_size: 16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of two blocks and rows; those of the test split could not even be read."""
    root = tmp_path_factory.mktemp("advice")
    tiny.save(tiny.bert(num_hidden_layers=2), root / "model")
    tiny.write_jsonl(root / "train.jsonl", tiny.reviews(120))
    (root / "test.jsonl").write_text("this is no JSON and breaks whoever opens it")
    (root / "small.yaml").write_text(RECIPE)
    return root


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few steps as make a ladder."""
    monkeypatch.setattr(ladder, "FOLDS", 2)
    monkeypatch.setattr(ladder, "SHORT", (2, 2))
    monkeypatch.setattr(trials, "HEAD_STEPS", (6, 6))


def climbed(place: Path, budget: str = "10m", seed: int = 0) -> tuple[list[Rung], Advice]:
    *rungs, last = advise.advise(load(place / "small.yaml"), "small", place, place / "runs", Budget.read(budget), seed)
    assert isinstance(last, Advice)
    return [rung for rung in rungs if isinstance(rung, Rung)], last


def test_the_ladder_answers_and_writes_a_recipe_that_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rungs, found = climbed(place)
    assert [rung.name for rung in rungs] == list(ladder.TITLES.values())
    assert all(rung.seconds >= 0 for rung in rungs)
    assert found.verdict is not None
    assert found.verdict.decided_by == "finalists"
    assert set(found.probes) == {"embeddings", "block 0", "block 1"}
    assert {"majority", "bag of words", "shuffled labels"} == set(found.controls)
    assert set(found.short) >= {HEAD, "embeddings", "block 0", "block 1", "all blocks", EVERYTHING}
    for name, runs in found.short.items():
        rows = [row for run in runs for row in run.rows]
        assert len(rows) == len(set(rows)) == 120, f"{name} is not judged once on every row"
    folder = place / "runs/small-advice"
    said = json.loads((folder / "advice.json").read_text())
    assert said["verdict"]["chosen"] == found.verdict.chosen
    page = (folder / "advice.html").read_text()
    assert "Do I need to unfreeze?" in page
    assert "<script" not in page
    recipe = folder / "small.advised.yaml"
    assert "# Do I need to unfreeze?" in recipe.read_text()
    for command in (["check", str(recipe)], ["plan", str(recipe), "--examples", "100", "--data-root", str(place)]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0, capsys.readouterr().err


def test_weights_are_as_they_were_after_a_trial(place: Path) -> None:
    from accelerate import Accelerator

    from engine.advising import bench
    from engine.advising.budget import Clock

    found = bench.gather(load(place / "small.yaml").recipe, place, None, Accelerator(cpu=True))
    before = {name: tensor.clone() for name, tensor in found.learner.tensors().items()}
    rows = trials.folds(found.labels, 2, 0)
    (train, judge), *_ = trials.splits(rows)
    with trials.entered(found, found.candidates[EVERYTHING], Clock()) as arm:
        one = arm.run(trials.Run(train, judge, 0, 0, 1e-2, 1e-2, 3), found.start)
        again = arm.run(trials.Run(train, judge, 0, 0, 1e-2, 1e-2, 3), found.start)
        assert any(not tensor.equal(before[name]) for name, tensor in found.learner.tensors().items())
    assert isinstance(one, Judged)
    assert one.losses.tolist() == again.losses.tolist()
    assert all(tensor.equal(before[name]) for name, tensor in found.learner.tensors().items())


def test_what_is_left_out_hands_on_what_it_was_given(place: Path) -> None:
    import numpy as np
    from accelerate import Accelerator

    from engine.advising import bench, passes
    from engine.advising.budget import Clock

    found = bench.gather(load(place / "small.yaml").recipe, place, None, Accelerator(cpu=True))
    kept, without = passes.features(found, Clock()), passes.bypassed(found, Clock(), np.arange(120))
    assert sorted(without) == ["block 0", "block 1"]
    np.testing.assert_array_equal(without["block 1"], kept["block 0"])
    assert not np.allclose(without["block 0"], kept["block 1"])
    np.testing.assert_array_equal(passes.features(found, Clock())["block 1"], kept["block 1"])


def test_folds_deal_every_class_evenly(place: Path) -> None:
    import numpy as np

    labels = np.array([0] * 40 + [1] * 8 + [2] * 4)
    found = trials.folds(labels, 4, 3)
    assert sorted(np.concatenate(found).tolist()) == list(range(52))
    assert [int((labels[rows] == 2).sum()) for rows in found] == [1, 1, 1, 1]
    assert [rows.tolist() for rows in trials.folds(labels, 4, 3)] == [rows.tolist() for rows in found]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_advice(place: Path) -> None:
    assert climbed(place)[1].hash == climbed(place)[1].hash


@pytest.mark.slow
def test_a_budget_that_ends_early_still_answers_and_says_what_is_missing(place: Path) -> None:
    _, found = climbed(place, "6s")
    assert found.dropped
    assert (place / "runs/small-advice/advice.html").exists()


def test_a_task_without_single_labels_is_refused(place: Path) -> None:
    scored = [{"text": row["text"], "label": float(index)} for index, row in enumerate(tiny.reviews(40))]
    tiny.write_jsonl(place / "scores.jsonl", scored)
    changed = ["data.data_files.train=scores.jsonl"]
    with pytest.raises(PlanError, match="one label for each example"):
        list(advise.advise(load(place / "small.yaml", changed), "scores", place, place / "runs", Budget.read("1m")))


def outline(blocks: int, tied: bool = False) -> Outline:
    """Embeddings, blocks and a head, each with one weight of 10 x 10; the head may be the embeddings' own."""
    names = ["emb", *(f"layers.{index}" for index in range(blocks)), *([] if tied else ["head"])]
    parameters = [Parameter(f"{name}.weight", name, (10, 10)) for name in names]
    if tied:
        parameters[0] = Parameter("emb.weight", "emb", (10, 10), aliases=("head.weight",))
    return Outline(
        "Model", (), tuple(parameters), blocks=tuple(names[1 : 1 + blocks]), head=("head",), embeddings=("emb",)
    )


def test_units_cover_a_model_once() -> None:
    found = units(outline(6))
    assert [unit.name for unit in found] == ["embeddings", *(f"block {index}" for index in range(6)), "head"]
    assert sum(unit.size for unit in found) == 800


def test_many_blocks_are_taken_together() -> None:
    found = [unit for unit in units(outline(24)) if unit.name.startswith("block")]
    assert [unit.pattern for unit in found][:2] == ["@blocks[0:3]", "@blocks[3:6]"]
    assert len(found) == 8
    assert [len(unit.parameters) for unit in found] == [3] * 8


def test_tied_weights_are_one_unit() -> None:
    found = units(outline(2, tied=True))
    assert [unit.name for unit in found] == ["embeddings", "block 0", "block 1"]


def test_candidates_are_singles_tops_and_everything() -> None:
    found = candidates(units(outline(6)), 6)
    assert [each.name for each in found] == [
        HEAD,
        "embeddings",
        *(f"block {index}" for index in range(6)),
        "top 2",
        "top 3",
        "top 4",
        "all blocks",
        EVERYTHING,
    ]
    quarter = anchor(found)
    assert quarter is not None
    assert quarter.name == "top 2"
    pair = window(units(outline(6)), ["block 2", "block 3"])
    assert (pair.name, pair.opens) == ("block 2 + block 3", ("@blocks[2]", "@blocks[3]"))
