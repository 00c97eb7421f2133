"""The lock of a run, and the order in which a save reaches the disk: each safeguard, taken away, is missed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from saving import flip, in_child

from engine import checkpoint
from engine.errors import ENVIRONMENT, LOCKED, RunError
from engine.keeping import durable

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
Check = Callable[[ModuleType, Path, pytest.MonkeyPatch], None]
has_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")


def hold(folder: Path, workers: int, tell: int) -> None:
    with checkpoint.lock(folder):
        for _ in range(workers):
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
        os.write(tell, b"x")
        time.sleep(60)


def holder(folder: Path, workers: int = 0) -> int:
    """Fork a process that holds the lock until it is killed, with forked workers that outlive it by seconds."""
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        try:
            hold(folder, workers, tell)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_is_told_whose_folder_it_is(tmp_path: Path, workers: int):
    child = holder(tmp_path / "run", workers)
    try:
        with pytest.raises(RunError, match=rf"run\.lock: .*pid {child} on {socket.gethostname()}") as refused:
            checkpoint.lock(tmp_path / "run").__enter__()
        assert refused.value.exit_code == LOCKED
    finally:
        kill(child)
    with checkpoint.lock(tmp_path / "run"):
        assert in_child(lambda: checkpoint.lock(tmp_path / "run").__enter__()) == 100 + LOCKED
    with checkpoint.lock(tmp_path / "run"):
        pass


def test_a_lock_that_cannot_be_taken_names_the_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"run\.lock: can't be opened") as refused:
        checkpoint.lock(tmp_path / "file").__enter__()
    assert refused.value.exit_code == ENVIRONMENT
    (tmp_path / "run.lock").symlink_to(tmp_path / "file")
    with pytest.raises(RunError, match=r"run\.lock: can't be opened"):
        checkpoint.lock(tmp_path).__enter__()
    assert (tmp_path / "file").read_bytes() == b""


def test_what_another_wrote_into_the_lock_is_shown_without_its_control_characters(tmp_path: Path):
    child = holder(tmp_path)
    try:
        (tmp_path / "run.lock").write_bytes(b"\x1b]0;title\x07\n\xff" + b"x" * 1000)
        with pytest.raises(RunError) as refused:
            checkpoint.lock(tmp_path).__enter__()
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 500
    finally:
        kill(child)


def test_the_lock_clears_away_what_was_staged(tmp_path: Path):
    (tmp_path / ".staging-old" / "deep").mkdir(parents=True)
    (tmp_path / ".staging-old" / "file").touch()
    with checkpoint.lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def save(module: ModuleType, folder: Path, step: int) -> Path:
    tensors = {"weights": {"w": torch.full((3,), float(step))}, "moments": {"w": torch.zeros(3)}}
    return module.publish(folder, f"step-{step}", tensors, {"step": step})


def content(path: str | Path) -> object:
    return sorted(os.listdir(path)) if os.path.isdir(path) else Path(path).read_bytes()


def saves_in_order(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save and a rotation, watched: what is not on the disk yet when something is renamed counts as lost."""
    save(module, folder, 1)
    synced: dict[str, object] = {}
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[path] = content(path)
        events.append("sync " + (path if path == str(folder) else Path(path).name.split("-")[0]))
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        if target == folder / "step-2":
            paths = [source, *Path(source).iterdir()]
            assert len(paths) == 5
            for path in paths:
                assert synced.get(str(path)) == content(path), f"{path.name} was not on the disk"
        else:
            assert (source, target.parent.parent) == (folder / "step-1", folder)
            assert checkpoint.verify(folder / "step-2")
        events.append("publish" if target == folder / "step-2" else "retire")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    save(module, folder, 2)
    assert module.rotate(folder, keep=1) == ["step-1"]
    groups = ["sync weights.safetensors", "sync moments.safetensors"]
    listed = ["sync state.json", "sync MANIFEST.json", "sync .staging"]
    assert events == [*groups, *listed, "publish", f"sync {folder}", "retire", f"sync {folder}"]


def damage_is_seen(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(module, folder, step)
    flip(folder / "step-2" / "weights.safetensors", -1)
    assert module.newest(folder).name == "step-1"
    flip(folder / "step-2" / "weights.safetensors", -1)
    flip(folder / "step-2" / "state.json", -2)
    assert module.newest(folder).name == "step-1"
    flip(folder / "step-2" / "state.json", -2)
    assert module.newest(folder).name == "step-2"


def only_one_holds(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with module.lock(folder):
        child = in_child(lambda: module.lock(folder).__enter__())
    assert child == 100 + LOCKED


def workers_let_go(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "lock", module.lock)
    kill(holder(folder, workers=1))
    assert in_child(lambda: module.lock(folder).__enter__()) == 0


CHECKS: list[Check] = [
    pytest.param(saves_in_order, marks=has_proc),  # type: ignore[list-item]
    damage_is_seen,
    only_one_holds,
    workers_let_go,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_safeguards(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check(checkpoint, tmp_path / "run", monkeypatch)


def changed(module: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it would be with `new` in place of `old`."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} is no longer in {module.__name__} once"
    (folder / "mutant.py").write_text(source.replace(old, new))
    specification = importlib.util.spec_from_file_location("mutant", folder / "mutant.py")
    assert specification is not None
    assert specification.loader is not None
    mutant = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    specification.loader.exec_module(mutant)
    return mutant


PUBLISHED = """            os.rename(staging, target)
            durable.sync(folder)
"""
STATE_FIRST = """    durable.write(staging / STATE, content)
    files ="""
MUTANTS: list[tuple[Check, ModuleType, str, str]] = [
    (saves_in_order, durable, "os.fsync(descriptor)", "pass"),
    (saves_in_order, durable, "        file.write(content)\n    sync(path)", "        file.write(content)"),
    (saves_in_order, durable, "grave / path.name)\n    sync(path.parent)", "grave / path.name)"),
    (saves_in_order, checkpoint, "        durable.sync(path)\n", ""),
    (saves_in_order, checkpoint, "    durable.sync(staging)\n", ""),
    (saves_in_order, checkpoint, PUBLISHED, "            os.rename(staging, target)\n"),
    (
        saves_in_order,
        checkpoint,
        PUBLISHED,
        "            durable.sync(folder)\n            os.rename(staging, target)\n",
    ),
    (saves_in_order, checkpoint, "os.rename(staging, target)", "shutil.copytree(staging, target)"),
    (saves_in_order, checkpoint, "staging = durable.stage(folder)", "(staging := target).mkdir()"),
    (saves_in_order, checkpoint, "ordinary[keep:]):\n", "ordinary[keep - 1 :]):\n"),
    (saves_in_order, checkpoint, "reversed(ordinary[keep:])", "reversed([])"),
    (damage_is_seen, checkpoint, "if durable.fingerprint(path / file) != listed:", "if False:"),
    (damage_is_seen, checkpoint, "checkpoint._age, reverse=True", "checkpoint._age"),
    (only_one_holds, durable, "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    (only_one_holds, durable, "fcntl.LOCK_EX |", "fcntl.LOCK_SH |"),
    (workers_let_go, durable, "os.register_at_fork(after_in_child=_let_go)\n", ""),
]


@pytest.mark.parametrize(("check", "module", "old", "new"), MUTANTS)
def test_a_safeguard_taken_away_is_missed(
    check: Check, module: ModuleType, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if check is saves_in_order and not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are read from /proc")
    mutant = changed(module, old, new, tmp_path, monkeypatch)
    subject = mutant
    if module is durable:
        monkeypatch.setattr(checkpoint, "durable", mutant)
        monkeypatch.setattr(checkpoint, "lock", mutant.lock)
        subject = checkpoint
    with pytest.raises((AssertionError, RunError)):
        check(subject, tmp_path / "run", monkeypatch)
