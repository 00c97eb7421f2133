"""Memory that runs out within a step, on one device of two or on the only one, costs time and nothing else."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import running
import senses
import staged
import tiny
import torch

from engine import learner
from engine.records import Step

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
STAGES = [staged.STAGES[1] | {"steps": 3}]


def out_of_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def once_in_forward() -> None:
    """The next forward pass of training finds no memory, and those after it do."""
    loss = learner.Learner._loss

    def short(self: learner.Learner, model: torch.nn.Module, batch: learner.Batch) -> torch.Tensor:
        learner.Learner._loss = loss
        return out_of_memory()

    learner.Learner._loss = short


def once_in_backward() -> None:
    """The next backward pass does, when the sum over the devices has begun."""
    loss = learner.Learner._loss

    def short(self: learner.Learner, model: torch.nn.Module, batch: learner.Batch) -> torch.Tensor:
        learner.Learner._loss = loss
        found = loss(self, model, batch)
        found.register_hook(out_of_memory)
        return found

    learner.Learner._loss = short


def place(root: Path) -> Path:
    return staged.place(root, stages=STAGES)


def test_all_halve_where_one_runs_out(tmp_path: Path):
    """Nobody waits for the one, and none of its rows are lost or taken twice."""
    one, two = place(tmp_path / "one"), place(tmp_path / "two")
    assert staged.run(one, plant=staged.at_step(2, once_in_forward)) == [0], staged.said(one)
    codes = staged.run(two, ranks=2, plant=staged.at_step(2, once_in_forward, rank=1))
    assert codes == [0, 0], staged.said(two) + staged.said(two, 1)
    told = "stage `lora`, step 2: the memory of a device ran out; from here on 8 examples a step = "
    assert f"{told}1 x 4 x 2" in staged.said(one)
    assert f"{told}2 x 2 x 2" in staged.said(two)
    for name, tensor in staged.weights(one).items():
        torch.testing.assert_close(staged.weights(two)[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_where_it_is_too_late_all_end_in_words(tmp_path: Path):
    root = place(tmp_path)
    codes = staged.run(root, ranks=2, plant=staged.at_step(2, once_in_backward, rank=1))
    assert codes == [3, 5], staged.said(root) + staged.said(root, 1)
    assert staged.said(root).splitlines()[-1].startswith("another process of this run is gone")
    said = staged.said(root, 1).splitlines()[-1]
    assert said.startswith(
        "stage `lora`: the memory of device 1 ran out within a step; give `per_device_batch_size: 2`"
    )
    assert "Traceback" not in staged.said(root) + staged.said(root, 1)


@pytest.mark.slow
def test_one_example_that_does_not_fit_is_told(tmp_path: Path):
    root = place(tmp_path)

    def plant(_rank: int) -> None:
        learner.Learner._loss = out_of_memory

    assert staged.run(root, ranks=2, plant=plant) == [5, 5]
    assert staged.said(root).splitlines()[-1] == "stage `lora`: one example alone doesn't fit the device's memory"
    assert staged.said(root, 1) == ""


@pytest.mark.parametrize(("rows", "freeze", "dies"), [(9, [], True), (8, [], False), (9, ["@norms"], False)])
def test_a_single_picture_for_a_batch_norm_is_told_of_at_the_start(
    tmp_path: Path, rows: int, freeze: list[str], dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ResNet shrinks 32 pixels to one: torch can't train on one picture of that, which the ninth of nine would be."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    senses.pictures(tmp_path / "rows", {"train": rows, "validation": 3})
    senses.save_picture_model(tiny.resnet(), tmp_path / "model")
    keys = {"task": "image-classification", "freeze": freeze, "stages": [running.stage(epochs=1)]}
    if not dies:
        assert running.events(running.run(tmp_path, **keys), Step)
        return
    said, code, happened = running.stopped(tmp_path, **keys)
    assert "a device comes to take one of 9 examples by itself" in said
    assert (code, running.events(happened, Step)) == (5, [])
