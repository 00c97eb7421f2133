"""Trackers hear what metrics.jsonl says, on one axis of steps, resumed or not; one that fails ends no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import staged
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import LoggerType

from engine import records, tracking
from engine.cli import main
from engine.errors import RunError
from engine.records import Evaluated, Note, StageEnded, StageStarted, Step

STEP = Step("a", 3, 4, 0.5, 1.5, (1e-3, 1e-4), 2.0)


def drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder of its files: steps and values by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), {"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl: a stage begins where the one before has ended."""
    found: dict[str, list[tuple[int, float]]] = {}
    starts, end = {}, 0
    for event in records.read(folder / "metrics.jsonl"):
        kind = event["event"]
        if kind == "stage_started":
            starts.setdefault(event["stage"], end)
        elif kind in ("step", "evaluated", "stage_ended"):
            at = starts[event["stage"]] + event["step"]
            rates = event.get("rates") or [0.0]
            said = {
                "step": {"train/loss": event.get("loss"), "train/learning_rate": max(rates)},
                "evaluated": {
                    f"{event.get('split')}/{name}": value for name, value in event.get("metrics", {}).items()
                },
                "stage_ended": {"stage/peak_bytes": event.get("peak_bytes")},
            }[kind]
            end = at if kind == "stage_ended" else end
            for tag, value in said.items():
                found.setdefault(tag, []).append((at, value))
    return found


def alike(folder: Path) -> None:
    """TensorBoard shows what is on record, no more and no less."""
    seen, said = drawn(folder / "frostline"), recorded(folder)
    assert {"train/loss", "train/learning_rate", "validation/accuracy", "stage/peak_bytes"} <= set(said) <= set(seen)
    for tag, points in said.items():
        assert [at for at, _ in seen[tag]] == [at for at, _ in points], tag
        assert [value for _, value in seen[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


def test_tensorboard_shows_what_is_on_record_after_a_kill_as_well(tmp_path: Path) -> None:
    root = staged.place(tmp_path)
    log = ("--log-with", "tensorboard")
    assert staged.run(root, *log, plant=staged.signal_at(9, signal.SIGKILL)) == [-signal.SIGKILL]
    assert staged.run(root, *log) == [0], staged.said(root)
    alike(staged.folder(root))
    assert staged.run(root, "--fresh") == [0]
    assert not (staged.folder(root) / "frostline").exists()


def into(folder: Path) -> staged.Plant:
    """Has trackio keep its runs in a folder, and no process look for the Hub."""
    return lambda rank: os.environ.update(TRACKIO_DIR=str(folder), HF_HUB_OFFLINE="1")


def kept(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What trackio itself reads of the only run in its folder, in a process of its own: steps and values by name."""
    code = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("frostline")
rows, machine = SQLiteStorage.get_logs("frostline", run.name), SQLiteStorage.get_system_logs("frostline", run.name)
print(json.dumps({"run": run.name, "seed": run.config["seed"], "rows": rows, "machine": machine}))
"""
    environment = os.environ | {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["run"], said["seed"], said["machine"]) == ("staged", 3, [])
    found: dict[str, list[tuple[int, float]]] = {}
    for row in said["rows"]:
        for name in row.keys() - {"step", "timestamp"}:
            found.setdefault(name, []).append((row["step"], row[name]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_trackio_keeps_what_is_on_record_of_the_first_process_alone(tmp_path: Path, ranks: int) -> None:
    root = staged.place(tmp_path)
    codes = staged.run(root, "--log-with", "trackio", ranks=ranks, plant=into(tmp_path / "trackio"))
    assert codes == [0] * ranks, staged.said(root)
    seen, said = kept(tmp_path / "trackio"), recorded(staged.folder(root))
    assert {"train/loss", "train/learning_rate", "validation/accuracy", "stage/peak_bytes"} <= set(said) <= set(seen)
    for name, points in said.items():
        assert [at for at, _ in seen[name]] == [at for at, _ in points], name
        assert [value for _, value in seen[name]] == pytest.approx([value for _, value in points], rel=1e-9), name


@pytest.mark.slow
def test_only_the_first_of_two_processes_logs(tmp_path: Path) -> None:
    root = staged.place(tmp_path)
    assert staged.run(root, "--log-with", "tensorboard", ranks=2) == [0, 0], staged.said(root)
    alike(staged.folder(root))
    assert len(list((staged.folder(root) / "frostline").iterdir())) == 1


def test_a_tracker_that_fails_is_left_with_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(self: Any, values: Any, step: int = 0, **_: Any) -> None:
        calls.append(step)
        if len(calls) == 3:
            raise ConnectionError("the server\nhas gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    steps = [Step("a", at, 9, 0.5, 1.5, (1e-3,), 2.0) for at in range(1, 7)]
    accelerator = fake()
    (tmp_path / "metrics.jsonl").touch()
    happened = list(tracking.followed(steps, ["tensorboard"], accelerator, tmp_path, "x", {"a": [1, None, "b"]}))
    assert calls == [1, 2, 3]
    assert [event for event in happened if isinstance(event, Step)] == steps
    (note,) = [event for event in happened if isinstance(event, Note)]
    assert note.sentence == (
        "tensorboard failed at step 3 and is left out from here on (ConnectionError: the server has gone)"
    )
    assert accelerator.trackers == []


def test_a_tracker_that_cant_begin_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "frostline").write_text("in the way")
    with pytest.raises(RunError, match="tensorboard can't begin to log") as caught:
        list(tracking.followed([STEP], ["tensorboard"], fake(), tmp_path, "x", {}))
    assert caught.value.exit_code == 3


def test_other_processes_and_runs_without_trackers_log_nothing(tmp_path: Path) -> None:
    other = fake(is_main_process=False)
    assert list(tracking.followed([STEP], ["tensorboard"], other, tmp_path, "x", {})) == [STEP]
    assert list(tracking.followed([STEP], [], fake(), tmp_path, "x", {})) == [STEP]
    assert not list(tmp_path.iterdir())


def fake(**more: Any) -> Any:
    """What of an accelerator a tracker meets."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return accelerator if not more else SimpleNamespace(**more)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("tensorbord", 2, "did you mean `tensorboard`?"),
        ("nothing", 2, "there are aim, "),
        ("tensorboard,comet_ml", 3, "pip install comet_ml"),
    ],
)
def test_a_wrong_tracker_is_one_sentence_before_anything_is_read(
    words: str, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "comet_ml" else name)
    with pytest.raises(SystemExit) as ended:
        main(["run", "there/is/none.yaml", "--log-with", words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (code, "", 1)
    assert said in err


def test_a_wrong_tracker_is_refused_without_torch() -> None:
    code = "import sys, engine.tracking; print('torch' in sys.modules, 'accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_trackers_are_accelerates() -> None:
    assert set(tracking.TRACKERS) == set(LoggerType.list()) - {"all"}
    assert tracking.wanted(" tensorboard,tensorboard, ") == ("tensorboard",)
    assert tracking.wanted("") == ()


def test_every_number_has_a_name_and_what_is_none_is_left_out() -> None:
    assert tracking.values(STEP) == {
        "train/loss": 0.5,
        "train/gradient_norm": 1.5,
        "train/learning_rate": 1e-3,
        "train/lowest_learning_rate": 1e-4,
        "train/seconds": 2.0,
    }
    judged = Evaluated("a", 3, "test", {"accuracy": 0.5, "loss": float("nan")})
    assert tracking.values(judged) == {"test/accuracy": 0.5}


def test_stages_lie_on_one_axis() -> None:
    axis = tracking.Axis()
    axis.begin("a")
    assert axis.of(STEP) == 3
    assert axis.of(StageEnded("a", 3, "early")) == 3
    axis.begin("b")
    assert axis.of(Step("b", 2, 4, 0.5, 1.5, (), 2.0)) == 5
    assert axis.of(Evaluated("a", 3, "test", {})) == 3
    happened = [StageStarted("a", 1, 4, 0), STEP, StageEnded("a", 3, "early"), StageStarted("b", 1, 4, 0)]
    again = tracking.Axis([event.json() for event in happened])
    again.begin("b")
    assert again.of(Step("b", 2, 4, 0.5, 1.5, (), 2.0)) == 5
