"""Two processes train what one trains, to the bit; where they can't agree or one is lost, no run goes on in silence."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import staged

from engine import data, freezing, judging, learner, start, train
from engine.devices import processes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
ROOT = Path(__file__).parent.parent
GONE = "another process of this run is gone"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, in micro-batches of half a batch."""
    root = staged.place(tmp_path_factory.mktemp("one"))
    assert staged.run(root) == [0]
    return root


def same(one: Path, other: Path) -> bool:
    """Whether weights and records are equal; the mean loss of a step is summed in another order on two devices."""
    for mine, its in itertools.zip_longest(staged.history(one), staged.history(other)):
        assert mine.pop("loss", 0.0) == pytest.approx(its.pop("loss", 0.0), rel=1e-14)
        assert mine == its
    return staged.equal(staged.weights(one), staged.weights(other))


def test_two_are_one(one: Path, tmp_path: Path):
    """The cache, filled by both, is in use."""
    root = staged.fresh(one, tmp_path)
    codes = staged.run(root, ranks=2, plant=lambda rank: staged.write_boundaries(root, rank))
    assert codes == [0, 0], staged.said(root, 1)
    assert "replays" in staged.said(root)
    assert staged.said(root, 1) == ""
    assert same(one, root)
    first, second = ((root / f"boundaries-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert len(set(first)) == len(staged.STAGES)


def test_one_goes_on_as_two_and_two_as_one(one: Path, tmp_path: Path):
    root, ranks = staged.fresh(one, tmp_path), itertools.cycle([1, 2])
    for number, steps in ((1, 2), (2, 3), (1, 4), (2, 4)):
        codes = staged.run(root, ranks=number, plant=staged.signal_at(steps, signal.SIGTERM, rank=number - 1))
        assert codes == [143] * number, staged.said(root)
        assert staged.said(root).count("stopped as asked") == 1
    assert staged.run(root, ranks=next(ranks)) == [0]
    assert same(one, root)


@pytest.mark.slow
def test_micro_batches_stay_what_they_were_when_the_devices_become_fewer(one: Path, tmp_path: Path):
    """Without a ceiling, two devices take four examples each and one would take eight: dropout would be another."""
    root = staged.fresh(one, tmp_path, per_device_batch_size=None)
    assert staged.run(root, ranks=2, plant=staged.signal_at(6, signal.SIGTERM)) == [143, 143]
    assert staged.run(root) == [0]
    assert same(one, root)


def test_an_evaluation_is_the_same_on_one_two_and_three(one: Path, tmp_path: Path):
    """13 rows one by one, so that the order of their sum would tell, and weights that stand still."""
    still = [{"name": "head", "steps": 4, "learning_rate": 1e-30}]
    judged = []
    for ranks in (1, 2, 3):
        root = staged.fresh(one, tmp_path / str(ranks), stages=still, evaluation={"eval_steps": 2, "batch_size": 1})
        assert staged.run(root, ranks=ranks) == [0] * ranks
        judged.append([event["metrics"] for event in staged.history(root) if event["event"] == "evaluated"])
    assert judged[0] == judged[1] == judged[2]
    assert len(judged[0]) == 2


def test_early_stopping_is_decided_once(one: Path, tmp_path: Path):
    """The second process sees other losses than the first, and yet does what the first decides."""

    def plant(rank: int) -> None:
        judge, turns = train.judge, itertools.count()

        def ever_better(one: learner.Learner, split: data.Split) -> judging.Judgement:
            turn = float(next(turns))
            return replace(judge(one, split), metrics={"loss": -turn, "accuracy": turn})

        if rank == 1:
            train.judge = ever_better

    root = staged.fresh(one, tmp_path)
    assert staged.run(root, ranks=2, plant=plant) == [0, 0], staged.said(root, 1)
    assert same(one, root)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_run(one: Path, tmp_path: Path, lost: int):
    root, began = staged.fresh(one, tmp_path), time.monotonic()
    codes = staged.run(root, ranks=2, plant=staged.signal_at(5, signal.SIGKILL, rank=lost))
    assert time.monotonic() - began < 30
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 3
    assert staged.said(root, 1 - lost).splitlines()[-1].startswith(GONE)
    assert "Traceback" not in staged.said(root, 1 - lost)
    assert staged.run(root, ranks=2) == [0, 0]
    assert same(one, root)


def test_a_silent_process_ends_the_run(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "TIMEOUT", processes.timedelta(seconds=5))
    root = staged.fresh(one, tmp_path)
    stops = staged.at_step(5, lambda: os.kill(os.getpid(), signal.SIGSTOP), rank=1)
    first, second = staged.begin(root, ranks=2, plant=stops)
    try:
        assert staged.ends([first]) == [3], staged.said(root)
        assert staged.said(root).splitlines()[-1].startswith(GONE)
    finally:
        os.kill(second, signal.SIGKILL)
        staged.ends([second])


@pytest.mark.slow
def test_a_first_process_that_is_long_at_work_is_waited_for(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A million rows take longer to encode than a process may be silent within a step."""
    monkeypatch.setattr(processes, "TIMEOUT", processes.timedelta(seconds=5))

    def plant(rank: int) -> None:
        encode = data.encode

        def slowly(*arguments: object) -> data.Encoded:
            time.sleep(12 * (rank == 0))
            return encode(*arguments)

        data.encode = slowly

    root = staged.fresh(one, tmp_path)
    assert staged.run(root, ranks=2, plant=plant) == [0, 0], staged.said(root, 1)
    assert same(one, root)


@pytest.mark.slow
def test_a_first_process_that_hangs_at_work_is_given_up(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "TIMEOUT", processes.timedelta(seconds=5))

    def plant(rank: int) -> None:
        if rank == 0:
            data.encode = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)

    first, second = staged.begin(staged.fresh(one, tmp_path), ranks=2, plant=plant)
    try:
        assert staged.ends([second]) == [3], staged.said(tmp_path, 1)
        assert staged.said(tmp_path, 1).splitlines()[-1].startswith(GONE)
    finally:
        os.kill(first, signal.SIGKILL)
        staged.ends([first])


def test_a_failure_of_the_first_is_told_once(one: Path, tmp_path: Path):
    root = staged.fresh(one, tmp_path)
    (root / "rows/train.jsonl").write_text('{"text": "a", "label": 3}\n{"text": "b"}\n')
    assert staged.run(root, ranks=2) == [2, 2]
    assert "train.jsonl" in staged.said(root) or "label" in staged.said(root)
    assert staged.said(root, 1) == ""


@pytest.mark.slow
def test_hosts_that_share_no_storage_are_told_at_the_start(one: Path, tmp_path: Path):
    """Not when the run is to go on from a checkpoint that only one of them has."""

    def plant(rank: int) -> None:
        if rank == 1:
            here = start.RunFolder
            start.RunFolder = lambda path: here(path.with_name("elsewhere"))

    root = staged.fresh(one, tmp_path)
    assert staged.run(root, ranks=2, plant=plant) == [3, 3], staged.said(root, 1)
    assert staged.said(root, 1).splitlines()[-1].endswith("give all hosts the same storage")


def test_what_trains_is_compared(one: Path, tmp_path: Path):
    def plant(rank: int) -> None:
        obey = freezing.obey
        if rank == 1:
            freezing.obey = lambda model, names: obey(model, names - {"classifier.bias"})

    codes = staged.run(staged.fresh(one, tmp_path), ranks=2, plant=plant)
    assert codes == [5, 5]
    assert "the processes disagree about what trains in stage `head`" in staged.said(tmp_path)


def test_launches_that_split_the_brain(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each for itself would train on all rows, and write into the same folder."""
    root = staged.fresh(one, tmp_path)

    def blind(_rank: int) -> None:
        processes.Accelerator = lambda cpu, **more: accelerate.Accelerator(**more)

    codes = staged.run(root, ranks=2, plant=blind)
    assert codes in ([2, 2], [2, 3]), staged.said(root, 1)  # the first to end takes the store with it
    assert "Traceback" not in staged.said(root, 1)
    assert "the launcher started 2 processes and accelerate counts 1" in staged.said(root)
    with monkeypatch.context() as cpu:
        cpu.setenv("MASTER_ADDR", "127.0.0.1")  # all that `--cpu --num_processes 2` leaves of the wish
        assert staged.run(root) == [2]
        assert "starts one process, whatever N is" in staged.said(root)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert staged.run(root) == [2]
    assert "no launcher has told this one which" in staged.said(root)
    assert not staged.folder(root).exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_never_comes_is_a_sentence(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int):
    """The other ends by itself, without a launcher that would end it."""
    monkeypatch.setattr(processes, "TIMEOUT", processes.timedelta(seconds=2))
    root = staged.fresh(one, tmp_path)
    codes = staged.run(root, ranks=2, plant=lambda rank: os._exit(0) if rank == lost else None)
    assert (codes[lost], codes[1 - lost]) == (0, 3)
    said = staged.said(root, 1 - lost)
    assert said.splitlines()[-1].startswith("the processes of this run did not find each other")
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_lost_while_they_meet_is_a_sentence(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
):
    """Between the two meetings that a run begins with."""
    monkeypatch.setattr(processes, "TIMEOUT", processes.timedelta(seconds=5))

    def plant(rank: int) -> None:
        if rank == lost:
            processes.distributed.new_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

    root = staged.fresh(one, tmp_path)
    codes = staged.run(root, ranks=2, plant=plant)
    assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, 3)
    assert staged.said(root, 1 - lost).splitlines()[-1].startswith("the processes of this run did not find each other")


def launch(root: Path, *options: str) -> subprocess.Popen[str]:
    """The real launcher, as a user calls it on a machine without accelerators."""
    words = ["-m", "accelerate.commands.launch", *options, "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "engine/run.py"]
    command = [sys.executable, *words, *staged.command(root)[1:]]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_the_real_launcher(one: Path, tmp_path: Path):
    root = staged.fresh(one, tmp_path)
    run = launch(root, "--multi_gpu")
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said
    assert said.count("staged on 2 x cpu") == 1
    assert same(one, root)


@pytest.mark.slow
def test_the_launch_that_starts_one_instead_of_two(one: Path, tmp_path: Path):
    run = launch(staged.fresh(one, tmp_path), "--cpu")
    said, _ = run.communicate(timeout=200)
    assert run.returncode != 0
    assert said.count("starts one process, whatever N is") == 1


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_real_launcher(one: Path, tmp_path: Path, which: signal.Signals):
    root = staged.fresh(one, tmp_path, stages=[{"name": "head", "steps": 5000, "learning_rate": 1e-4}])
    run = launch(root, "--multi_gpu")
    while not list(staged.folder(root).glob("checkpoints/stage*")):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(which)
    said, _ = run.communicate(timeout=100)
    assert run.returncode != 0
    assert said.count("stopped as asked") == 1, said
    stages = [{"name": "head", "steps": 5000, "learning_rate": 1e-4}]
    assert json.loads((root / "staged.yaml").read_text())["stages"] == stages
    assert staged.run(root, ranks=2, plant=staged.signal_at(1, signal.SIGTERM)) == [143, 143]
    assert "goes on from stage-00" in staged.said(root)
