"""Starts a command again for as long as a restart can cure what ended it. It knows no recipe and opens no checkpoint.

`accelerate launch` ends with 1 whatever its processes end with. So each `frostline` process that a supervisor has
started leaves a file in a folder of its own: locked while the process lives, and holding its exit code once it is over.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import ENVIRONMENT, GUARD, LOCKED, NOTHING_TO_RESUME, REFUSED, STOPPED, RunError

FOLDER = "FROSTLINE_ENDINGS"
"""The variable that tells a process where to leave its exit code."""
FINAL = {REFUSED, LOCKED, GUARD, NOTHING_TO_RESUME, STOPPED, 128 + signal.SIGINT}
"""Exit codes that a second try would only find again, and those of a run which was asked to stop."""


def enrol() -> None:
    """Make this process known to the supervisor that has started it, if one has.

    Raises `RunError` where that one has gone on already: a launcher was lost while this process was on its way.
    """
    if folder := os.environ.get(FOLDER):
        try:
            held = os.open(Path(folder) / str(os.getpid()), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_EX)  # held until this process ends, however it ends
        except OSError as error:
            raise RunError("what has started this process is gone, and so it ends", ENVIRONMENT) from error


def ended(code: int) -> None:
    """Leave this process's exit code with its supervisor; one that crashes or is killed leaves none."""
    if folder := os.environ.get(FOLDER):
        with suppress(OSError):
            (Path(folder) / str(os.getpid())).write_text(str(code))


def supervise(command: Sequence[str], restarts: int, pause: float) -> int:
    """Run a command, and run it again `pause` seconds after each end that a restart can cure; the last exit code.

    A signal that this process gets goes to the command and is the last of it. Raises `RunError` where there is no such
    command, or after the last restart.
    """
    turn = 0
    while True:
        turn += 1
        with tempfile.TemporaryDirectory(prefix="frostline-") as folder:
            code, asked = _once(command, folder)
            codes = _codes(Path(folder))
            _end_orphans(Path(folder))
        final = sorted(FINAL.intersection(codes))
        if code == 0 or asked or final or (turn == 1 and not codes):  # nobody of ours: the command itself is wrong
            return final[0] if final else STOPPED if asked else code
        said = f"`{command[0]}` has ended with {code}"
        if turn > restarts:
            what = f"{said} and may not start again: it had {restarts} restarts"
            raise RunError(f"{what}; see what its processes said last")
        print(f"{said}; it starts again in {pause:g} s ({turn} of {restarts})", file=sys.stderr, flush=True)
        time.sleep(pause)


def _once(command: Sequence[str], folder: str) -> tuple[int, bool]:
    """The exit code of a command, negative where a signal ended it, and whether this process was asked to stop."""
    try:
        # In a session of its own, or a terminal would send it the signal that is passed on to it below.
        child = subprocess.Popen(command, env=os.environ | {FOLDER: folder}, start_new_session=True)
    except OSError as error:
        raise RunError(f"`{command[0]}` can't be started ({error.strerror}); write a command", REFUSED) from error
    with _passing_on(child) as asked:
        return child.wait(), bool(asked)


@contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Passes SIGTERM, SIGINT and SIGHUP on to a command instead of dying of them; those that came."""
    came: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        came.append(number)
        child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _codes(folder: Path) -> list[int | None]:
    """What each process that made itself known has ended with: None where it left no code."""
    return [int(text) if (text := path.read_text()) else None for path in sorted(folder.iterdir())]


def _end_orphans(folder: Path) -> None:
    """Kill what a killed launcher has left behind: it would train on, and hold the run's folder."""
    for path in folder.iterdir():
        held = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)
        finally:
            os.close(held)
