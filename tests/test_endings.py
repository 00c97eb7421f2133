"""How a run ends, and what is there afterwards: signals, locks, full disks, damage, other recipes, guards."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import saving
import staged
import torch
from torch import nn

from engine import data, judging, learner, train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STAGES = [
    {"name": "head", "steps": 3, "learning_rate": 1e-2},
    {"name": "top", "unfreeze": "@blocks[-1:]", "steps": 5, "learning_rate": 3e-2},
]
SHORT = {"stages": STAGES, "cache": "off"}


def slow(*values: object) -> list[object]:
    """Values of a parameter that only the long tests go through."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages."""
    root = staged.place(tmp_path_factory.mktemp("whole"), **SHORT)
    assert staged.run(root) == [0]
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """The same place without the run."""
    return staged.fresh(whole, tmp_path, **SHORT)


@pytest.fixture
def cut(root: Path) -> Path:
    """The same place with a run that was stopped in its second stage."""
    assert staged.run(root, plant=staged.signal_at(5, signal.SIGTERM)) == [143]
    return root


def goes_on(root: Path, whole: Path) -> bool:
    """Whether the same command comes to the same end as a run that nothing has cut off."""
    assert staged.run(root) == [0], staged.said(root)
    assert staged.history(root) == staged.history(whole)
    return staged.equal(staged.weights(root), staged.weights(whole))


def sentence(root: Path) -> str:
    """The last line that was printed; the run has ended without a traceback."""
    said = staged.said(root)
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize("which", [signal.SIGTERM, *slow(signal.SIGINT, signal.SIGHUP)])
def test_a_signal_ends_a_run_after_its_step(root: Path, whole: Path, which: signal.Signals):
    assert staged.run(root, plant=staged.signal_at(5, which)) == [143]
    assert sentence(root) == "stopped as asked at stage `top`, step 2 of 5; the same command goes on from there"
    assert goes_on(root, whole)


def test_a_signal_that_comes_twice_at_once_is_one(root: Path, whole: Path):
    """A launcher passes on to its processes what a terminal has sent to all of them."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    assert staged.run(root, plant=staged.at_step(5, twice)) == [143]
    assert goes_on(root, whole)


def test_a_signal_that_comes_again_later_is_obeyed_at_once(root: Path, whole: Path):
    def again() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    assert staged.run(root, plant=staged.at_step(5, again)) == [130]
    assert goes_on(root, whole)


def test_a_run_outlives_its_terminal_where_it_was_told_to(root: Path):
    def nohup(rank: int) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        staged.signal_at(5, signal.SIGHUP)(rank)

    assert staged.run(root, plant=nohup) == [0]


def test_a_second_run_in_one_folder_is_turned_away(root: Path, whole: Path):
    def second() -> None:
        (root / "second").write_text(str(staged.run(root, plant=lambda _: signal.alarm(60))))
        shutil.copy(root / "rank-0.out", root / "second.out")

    assert staged.run(root, plant=staged.at_step(5, second)) == [0]
    assert (root / "second").read_text() == "[4]"
    assert "another run is writing here" in (root / "second.out").read_text()
    assert staged.history(root) == staged.history(whole)
    assert staged.equal(staged.weights(root), staged.weights(whole))


def limit_files(size: int) -> Callable[[], None]:
    """No file may grow beyond so many bytes: to a program, a full disk."""

    def act() -> None:
        for output in (1, 2):  # files as well, and not those that are meant
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return act


@pytest.mark.parametrize("size", [0, 2_000, *slow(100, 8_000, 40_000)])
def test_a_full_disk(root: Path, whole: Path, size: int):
    """While a record is written, a checkpoint, or the saved model; what was there stays, and the run goes on later."""
    code = staged.run(root, plant=staged.at_step(5, limit_files(size)))
    assert code == [3]
    assert not (staged.folder(root) / "model").exists()
    assert goes_on(root, whole)


def test_a_full_disk_while_going_on(cut: Path, whole: Path):
    """The papers of a run are written anew when it goes on: what they say must not be lost to a full disk."""
    assert staged.run(cut, plant=lambda _: limit_files(100)()) == [3]
    assert goes_on(cut, whole)


def test_damaged_checkpoints(cut: Path, whole: Path):
    """The newest damaged, the one before is taken; all of them damaged, none is guessed at."""
    checkpoints = sorted(staged.folder(cut).glob("checkpoints/stage*"))
    assert len(checkpoints) >= 2
    kept = shutil.copytree(cut / "runs", cut / "kept")
    saving.flip(checkpoints[-1] / "weights.safetensors", -1)
    assert staged.run(cut, plant=staged.signal_at(1, signal.SIGKILL)) == [-9]
    assert f"{checkpoints[-1].name} skipped: weights.safetensors differs from its manifest" in staged.said(cut)
    assert goes_on(cut, whole)
    shutil.rmtree(cut / "runs")
    kept.rename(cut / "runs")
    for checkpoint in checkpoints:
        saving.flip(checkpoint / "state.json", 5)
    assert staged.run(cut) == [6]
    assert "no checkpoint is intact" in staged.said(cut)
    assert staged.run(cut, "--fresh") == [0]
    assert staged.equal(staged.weights(cut), staged.weights(whole))


def test_records_that_a_crash_of_the_machine_has_shortened(cut: Path, whole: Path):
    """They are not filled up with zeros: what is lost is said."""
    path = staged.folder(cut) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    assert staged.run(cut) == [0]
    assert "metrics.jsonl has lost " in staged.said(cut)
    assert staged.equal(staged.weights(cut), staged.weights(whole))
    told = staged.history(cut)
    assert all(event in staged.history(whole) for event in told)


def test_lost_papers_are_asked_for(cut: Path, whole: Path):
    recipe = staged.folder(cut) / "recipe.yaml"
    kept = recipe.read_text()
    for content in (None, "", "a: [", "just words"):
        recipe.unlink(missing_ok=True)
        if content is not None:
            recipe.write_text(content)
        assert staged.run(cut)[0] in (2, 3)
        assert "`--fresh`" in staged.said(cut)
        assert "Traceback" not in staged.said(cut)
    recipe.write_text(kept)
    assert goes_on(cut, whole)


def test_a_finished_run_says_so(whole: Path):
    before = {path: path.stat().st_mtime_ns for path in staged.folder(whole).rglob("*") if path.is_file()}
    assert staged.run(whole) == [0]
    assert "holds a finished run; `--fresh` trains it again" in sentence(whole)
    after = {path: path.stat().st_mtime_ns for path in staged.folder(whole).rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"run.lock"}


def test_a_finished_run_of_another_recipe_is_not_this_one(root: Path, whole: Path):
    shutil.copytree(whole / "runs", root / "runs")
    staged.write(root, **SHORT, seed=4)
    assert staged.run(root) == [2]
    assert "  seed: 3 -> 4" in staged.said(root).splitlines()
    assert staged.run(root, "--fresh") == [0]
    assert not staged.equal(staged.weights(root), staged.weights(whole))


def test_fresh_starts_over_in_whatever_is_there(cut: Path, whole: Path):
    assert staged.run(cut, "--fresh") == [0]
    assert staged.history(cut) == staged.history(whole)
    assert "goes on from" not in staged.said(cut)


def test_fresh_that_is_killed_leaves_nothing_to_go_on_from(cut: Path, whole: Path):
    """Before each change of the disk that forgetting takes: the run goes on as it was, or begins anew, never in
    between."""
    kept, ends = shutil.copytree(cut / "runs", cut / "kept"), []
    for number in range(1, 200):
        shutil.rmtree(cut / "runs")
        shutil.copytree(kept, cut / "runs")

        def plant(_rank: int, number: int = number) -> None:
            from engine.keeping.folder import RunFolder

            clear = RunFolder.clear

            def killed(self: RunFolder) -> None:
                with saving.at_disk_call(number, saving.CHANGES, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                    clear(self)
                os._exit(0)

            RunFolder.clear = killed

        (code,) = staged.run(cut, "--fresh", plant=plant)
        ends.append(len(list(staged.folder(cut).glob("checkpoints/stage*"))))
        if code == 0:
            break
    assert len(ends) > 10
    assert set(ends) == {0, len(list(kept.glob("staged/checkpoints/stage*")))}
    assert ends[-1] == 0


def changed(**keys: Any) -> dict[str, Any]:
    return {**SHORT, **keys}


def training(**keys: Any) -> dict[str, Any]:
    return changed(training={**staged.RECIPE["training"], **keys})


def test_a_changed_recipe_is_refused_with_what_has_changed(cut: Path, whole: Path):
    other_stage = [STAGES[0], {**STAGES[1], "learning_rate": 1e-3}]
    for recipe, line in (
        (changed(seed=4), "  seed: 3 -> 4"),
        (changed(batch_size=4), "  batch_size: 8 -> 4"),
        (training(learning_rate=1e-3), "  training.learning_rate: 0.003 -> 0.001"),
        (training(max_grad_norm=0.1), "  training.max_grad_norm: None -> 0.1"),
        (changed(stages=other_stage), "  stages[1].learning_rate: 0.03 -> 0.001"),
        (changed(stages=STAGES[:1]), f"  stages[1]: {dict(sorted(STAGES[1].items()))!r} -> None"),
        (changed(freeze=["embeddings", "encoder"]), "  freeze: 'bert' -> ['embeddings', 'encoder']"),
    ):
        staged.write(cut, **recipe)
        assert staged.run(cut) == [2], staged.said(cut)
        assert line in staged.said(cut).splitlines()
    staged.write(cut, **training(logging_steps=1, save_steps=1, save_total_limit=1))
    assert staged.run(cut) == [0]
    assert staged.equal(staged.weights(cut), staged.weights(whole))


def test_stages_that_have_not_begun_may_change(cut: Path):
    more = {"name": "more", "unfreeze": "@blocks[-2:]", "steps": 2}
    staged.write(cut, **changed(stages=[*STAGES, more]))
    assert staged.run(cut) == [0], staged.said(cut)
    assert [event["stage"] for event in staged.history(cut) if event["event"] == "stage_ended"][-1] == "more"


@pytest.mark.parametrize("split", ["train", *slow("validation")])
def test_changed_rows_are_refused(cut: Path, split: str):
    path = cut / f"rows/{split}.jsonl"
    path.write_text(path.read_text().replace("film", "plot", 1))
    assert staged.run(cut) == [2]
    assert f"  data.{split}: not the same as when the run began" in staged.said(cut)


def test_a_changed_model_is_refused(cut: Path):
    import tiny

    tiny.save(tiny.bert(seed=1), cut / "model")
    assert staged.run(cut) == [2]
    assert "  model: not the same as when the run began" in staged.said(cut)


def never_unfinite(root: Path) -> bool:
    """Whether all that lies on the disk of a run's tensors is finite."""
    from safetensors.torch import load_file

    files = list(staged.folder(root).rglob("*.safetensors"))
    return bool(files) and all(torch.isfinite(each).all() for file in files for each in load_file(file).values())


@pytest.mark.parametrize("ranks", [*slow(1), 2])
def test_a_gradient_that_is_no_number(root: Path, whole: Path, ranks: int):
    """On one of the devices: all of them stop in the same step, and nothing of it is kept."""

    def poison() -> None:
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda self, *more, **keys: backward(self * float("nan"), *more, **keys)

    codes = staged.run(root, ranks=ranks, plant=staged.at_step(6, poison, rank=ranks - 1))
    assert codes == [5] * ranks
    assert sentence(root).startswith("stage `top`, step 3: the gradient is not finite (nan)")
    assert ranks == 1 or staged.said(root, 1) == ""
    assert never_unfinite(root)
    assert goes_on(root, whole)


def test_a_weight_that_is_no_number_is_never_kept(root: Path):
    """A checkpoint is due before any gradient or metric can tell of it."""
    last = learner.Learner.step

    def plant(_rank: int) -> None:
        def overflow(self: learner.Learner, step: int) -> float:
            norm = last(self, step)
            if self.stage.name == "top" and step == 1:
                with torch.no_grad():
                    self.parameters[0].view(-1)[0] = float("inf")
            return norm

        learner.Learner.step = overflow

    staged.write(root, **{**training(save_steps=1), "evaluation": {"eval_steps": 100}})
    assert staged.run(root, plant=plant) == [5]
    assert "is no longer finite, so nothing of it is kept" in sentence(root)
    assert never_unfinite(root)


def spoil(metric: str) -> None:
    """Have a metric come out as no number, in this process."""
    judge = train.judge

    def spoiled(one: learner.Learner, split: data.Split) -> judging.Judgement:
        found = judge(one, split)
        return replace(found, metrics=found.metrics | {metric: float("nan")})

    train.judge = spoiled


def test_a_metric_that_is_no_number(root: Path):
    def plant(_rank: int) -> None:
        spoil("accuracy")

    assert staged.run(root, plant=plant) == [5]
    assert sentence(root).startswith("stage `head`, step 2: `accuracy` is nan, so nothing can be best")


def test_a_metric_that_is_no_number_and_decides_nothing(root: Path, whole: Path):
    """It is on record as null, and a checkpoint that holds it can be written and read."""

    def plant(rank: int) -> None:
        spoil("f1")
        staged.signal_at(5, signal.SIGTERM)(rank)

    assert staged.run(root, plant=plant) == [143], staged.said(root)
    judged = [event for event in staged.history(root) if event["event"] == "evaluated"]
    assert all(event["metrics"]["f1"] is None for event in judged)
    assert staged.run(root) == [0]
    assert staged.equal(staged.weights(root), staged.weights(whole))


def test_a_batch_without_a_live_label(root: Path):
    def plant(_rank: int) -> None:
        from engine.tasks.text_classification import TextClassification

        TextClassification.weight = lambda self, batch: 0

    assert staged.run(root, plant=plant) == [5]
    assert sentence(root) == "stage `head`, step 1: not one label is live"


def test_a_model_that_fails_its_proof_is_not_saved(root: Path):
    """A frozen tensor that moved: what was trained may not pass for the run's result."""

    def move() -> None:
        embedding = nn.Embedding.forward

        def moving(self: nn.Embedding, indices: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.add_(1e-3)
            return embedding(self, indices)

        nn.Embedding.forward = moving

    assert staged.run(root, plant=staged.at_step(8, move)) == [5]
    assert "which is frozen; don't use this model" in sentence(root)
    assert not (staged.folder(root) / "model").exists()
    assert '"finished"' not in (staged.folder(root) / "metrics.jsonl").read_text()
