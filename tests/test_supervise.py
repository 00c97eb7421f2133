"""A command is started again where that can help, and only there; nothing that it started outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import CRASH, ENVIRONMENT, GUARD, LOCKED, NOTHING_TO_RESUME, REFUSED, STOPPED, RunError
from engine.supervise import supervise

ROOT = Path(__file__).parent.parent
PROCESS = """
import os, sys
from engine import supervise

supervise.enrol()
with open(sys.argv[1], "a") as turns:
    turns.write(".")
turn, code = os.path.getsize(sys.argv[1]), 0
exec(sys.argv[2])
supervise.ended(code)
sys.exit(code and 1)
"""
"""A process as the command line has it; like a launcher's, its own exit code says only that something went wrong."""


def command(turns: Path, act: str) -> list[str]:
    return [sys.executable, "-c", PROCESS, str(turns), act]


def tried(turns: Path) -> int:
    return turns.stat().st_size if turns.exists() else 0


@pytest.mark.parametrize(
    ("act", "ends", "times"),
    [
        ("", 0, 1),
        (f"code = {ENVIRONMENT} * (turn < 3)", 0, 3),
        ("turn < 3 and os.kill(os.getpid(), 9)", 0, 3),
        ("turn < 3 and 1 / 0", 0, 3),
        *((f"code = {code}", code, 1) for code in (REFUSED, LOCKED, GUARD, NOTHING_TO_RESUME, STOPPED)),
    ],
)
def test_what_a_restart_can_cure(tmp_path: Path, act: str, ends: int, times: int):
    assert supervise(command(tmp_path / "turns", act), restarts=3, pause=0) == ends
    assert tried(tmp_path / "turns") == times


def test_there_is_a_limit(tmp_path: Path):
    with pytest.raises(RunError, match="it had 2 restarts"):
        supervise(command(tmp_path / "turns", f"code = {CRASH}"), restarts=2, pause=0)
    assert tried(tmp_path / "turns") == 3


def test_a_command_that_starts_nothing_of_ours_is_wrong_itself():
    assert supervise(["sh", "-c", "exit 7"], restarts=3, pause=0) == 7
    with pytest.raises(RunError, match="can't be started"):
        supervise(["./no-such-command"], restarts=3, pause=0)


LAUNCHER = """
import os, subprocess, sys, time

subprocess.Popen(sys.argv[2:], start_new_session=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
sys.exit(1)
"""
"""One that is lost while the process that it has started lives on."""


def test_what_a_lost_launcher_leaves_is_ended(tmp_path: Path):
    """Whether the process has made itself known by then, as in the first turn, or is still on its way."""
    waits = f"open(f'{tmp_path}/pid-{{turn}}', 'w').write(str(os.getpid())); __import__('time').sleep(60)"
    worker = command(tmp_path / "turns", waits)
    with pytest.raises(RunError, match="it had 1 restarts"):
        supervise([sys.executable, "-c", LAUNCHER, str(tmp_path / "pid-1"), *worker], restarts=1, pause=0)
    end = time.monotonic() + 10
    while any(running(int(path.read_text() or 1)) for path in tmp_path.glob("pid-*")):
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process is there and is not only waiting to be looked after."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_signal_is_passed_on_and_is_the_end(tmp_path: Path):
    waits = "import signal, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(30)"
    words = [sys.executable, "-m", "engine.cli", "supervise", "--pause", "0", *command(tmp_path / "turns", waits)]
    with subprocess.Popen(words, cwd=ROOT) as supervisor:
        while not tried(tmp_path / "turns"):
            time.sleep(0.05)
        time.sleep(0.3)
        began = time.monotonic()
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait() == STOPPED
    assert time.monotonic() - began < 10
    assert tried(tmp_path / "turns") == 1
