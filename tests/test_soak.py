"""The soak loses nothing, and finds out at once when a safeguard is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from _power import Disk

ROOT = Path(__file__).parent.parent
has_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="synced files are read from /proc")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@has_proc
def test_a_power_cut_leaves_what_was_synced(tmp_path: Path):
    """Content, names and renames, each of them only once it was waited for."""
    (folder := tmp_path / "live").mkdir()
    (folder / "old").write_text("old")
    disk = Disk(folder)
    with disk.watching():
        (folder / "new").write_text("ne")
        sync(folder)
        (folder / "new").write_text("new")
        sync(folder / "new")
        (folder / "old").rename(folder / "renamed")
    left = [memory.restore(tmp_path / str(number)) for number, memory in enumerate(disk.cuts)]
    contents = [{path.name: path.read_text() for path in each.iterdir()} for each in left]
    assert contents == [{"old": "old", "new": ""}, *[{"old": "old", "new": "new"}] * 2]


def soaked(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/soak.py"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@has_proc
def test_three_minutes_lose_nothing():
    done = soaked("--minutes", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 losses" in done.stdout


@pytest.mark.slow
@has_proc
@pytest.mark.parametrize(
    ("safeguard", "trial"),
    [
        ("fsync", "a power cut after each sync"),
        ("rename", "a power cut after each sync"),
        ("hash", "damage in a checkpoint"),
        ("lock", "two runs in one folder"),
    ],
)
def test_a_missing_safeguard_is_found(safeguard: str, trial: str):
    done = soaked("--minutes", "0", "--mutate", safeguard)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"LOST  {trial}: " in done.stdout
