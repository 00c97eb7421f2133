"""Checkpoints under kills, failing calls and full disks: what was published before stays readable."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from saving import CHANGES, READS, at_disk_call, found, in_child, names, publish

from engine.checkpoint import lock, rotate, verify
from engine.errors import ENVIRONMENT, NOTHING_TO_RESUME, RunError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def one() -> Iterator[Path]:
    """A folder with the checkpoint of step 2, in memory where there is such a disk: these tests sync a lot."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        publish(Path(folder) / "one", 2)
        yield Path(folder) / "one"


def save(folder: Path) -> None:
    publish(folder, 3)
    rotate(folder, keep=1)


def save_and_die(folder: Path, number: int) -> None:
    with at_disk_call(number, CHANGES, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        save(folder)


def goes_on(folder: Path) -> bool:
    """Whether a run that takes the lock now saves the next step and leaves nothing of the last one behind."""
    with lock(folder):
        publish(folder, 4)
    return found(folder)[0].name == "step-000004" and not any(name.startswith(".") for name in names(folder))


def test_killed_before_every_change_of_the_disk(one: Path):
    ends: list[tuple[int, int]] = []
    for number in range(1, 1000):
        folder = Path(shutil.copytree(one, one.with_name(str(number))))
        code = in_child(partial(save_and_die, folder, number))
        last, skipped = found(folder)
        visible = [verify(folder / name) for name in names(folder) if not name.startswith(".")]
        assert skipped == [], f"killed before change {number}"
        ends.append((last.state["step"], len(visible)))
        assert goes_on(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(ends) > 25
    assert set(ends) == {(2, 1), (3, 2), (3, 1)}
    assert ends == sorted(ends, key=lambda end: (end[0], -end[1]))


def kill_at_random(folder: Path, kills: int) -> int:
    """Kill a process that saves all the time, check after each kill; how many kills left a save half done."""
    halfway, generator = 0, random.Random(3)
    publish(folder, 1, size=256)
    for _ in range(kills):
        first = found(folder)[0].state["step"] + 1
        if (child := os.fork()) == 0:
            for step in range(first, 10**6):
                publish(folder, step, size=256)
                rotate(folder, keep=2)
            os._exit(0)
        time.sleep(generator.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        last, skipped = found(folder)
        assert skipped == []
        assert last.state["step"] >= first - 1
        halfway += any(name.startswith(".") for name in names(folder))
    return halfway


def test_killed_at_random(tmp_path: Path):
    assert kill_at_random(tmp_path, 20) >= 5


@pytest.mark.slow
def test_killed_at_random_two_hundred_times(tmp_path: Path):
    assert kill_at_random(tmp_path, 200) >= 50


def fails(folder: Path, number: int, code: int, functions: set[str]) -> tuple[bool, RunError | None]:
    """Save with one call failing: whether there was such a call, and what the user would be told."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with at_disk_call(number, functions, fail) as calls:
        try:
            save(folder)
        except RunError as error:
            return True, error
    return len(calls) >= number, None


@pytest.mark.parametrize(
    ("code", "functions"),
    [
        (errno.ENOSPC, CHANGES - {"close"}),
        (errno.EDQUOT, CHANGES - {"close"}),
        (errno.EIO, CHANGES - {"close"} | READS),
    ],
)
def test_a_failure_of_every_call_of_a_save(one: Path, code: int, functions: set[str]):
    refused = []
    for number in range(1, 1000):
        folder = Path(shutil.copytree(one, one.with_name(str(number))))
        failed, error = fails(folder, number, code, functions)
        last, skipped = found(folder)
        assert (last.state["step"] in (2, 3), skipped) == (True, []), f"call {number}"
        assert goes_on(folder), f"call {number}"
        if not failed:
            break
        refused += [error] if error else []
    assert len(refused) >= 15
    assert {error.exit_code for error in refused} <= {ENVIRONMENT, NOTHING_TO_RESUME}
    assert sum("earlier ones are untouched" in str(error) for error in refused) > 10
    assert last.state["step"] == 3


def large(folder: Path, step: int = 3) -> None:
    """Publish 320,010 bytes of tensors and state."""
    publish(folder, step, size=200)


def refusal(folder: Path) -> str:
    with pytest.raises(RunError) as refused:
        large(folder)
    assert refused.value.exit_code == ENVIRONMENT
    assert names(folder) == ["step-000001", "step-000002"]
    assert found(folder)[0].name == "step-000002"
    return str(refused.value)


def test_a_file_too_large_for_its_limit(one: Path):
    publish(one, 1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert "File too large" in refusal(one)

    assert in_child(limited) == 0
    large(one)
    assert found(one)[0].name == "step-000003"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    (mounted := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a disk that is small enough to fill")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("left", [0, 1, 5, 20, 39, 40, 41, 60, 79, 80, 81])
def test_a_full_disk(small_disk: Path, left: int):
    """With `left` pages of 4 KiB free; each of the two groups of tensors takes 40, state and manifest one each."""
    folder = small_disk / "run"
    for step in (1, 2):
        publish(folder, step)
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes((room.f_bavail - left) * room.f_frsize))
    said = refusal(folder)
    assert "No space left on device" in said
    assert f"it needs 320,010 bytes and {left * room.f_frsize:,} are free; earlier ones are untouched" in said
    (small_disk / "filler").unlink()
    large(folder)
    assert found(folder)[0].name == "step-000003"
