"""Try to lose work for as long as you like: kills, failing disks, power cuts, flipped bytes, crowds, hostile text.

    .venv/bin/python scripts/soak.py [--minutes 10 | --release] [--seed 7] [--mutate fsync|rename|hash|lock]

Prints a table of what was tried, how often, and what was lost; the exit code is 1 if anything was. `--release` holds
each trial to its bar, a number of tries or of minutes. The dice follow from the seed, the moments that kills hit from
the machine. `--mutate` takes one safeguard away, and has to turn it red.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402, F401  no network and one thread a process, before anything reads it

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)

import _disks  # noqa: E402
import _planted  # noqa: E402
import _trials  # noqa: E402
import staged  # noqa: E402
from _trials import Soak, Tally, Trial  # noqa: E402

from engine import checkpoint  # noqa: E402
from engine.keeping import durable  # noqa: E402


@dataclass
class Bar:
    """What a release has to show of a trial, and what it has shown so far."""

    trial: Trial
    tries: int = 1
    minutes: float = 0
    suite: bool = False
    """Whether it consists of tests, which are run anyway, but for a release."""
    shown: Tally = field(default_factory=Tally)
    turns: int = 0
    seconds: float = 0

    @property
    def reached(self) -> bool:
        return self.turns > 0 and self.shown.tries >= self.tries and self.seconds >= 60 * self.minutes


BARS = {
    "SIGKILL at any time of a run": Bar(_trials.killed_runs, tries=60),
    "SIGKILL at any time of two processes": Bar(_trials.killed_pairs, tries=15),
    "from one process to two to one": Bar(_trials.changing_pairs, tries=5),
    "SIGKILL inside of a save": Bar(_disks.killed_saves, tries=200),
    "a disk that fails at the Nth call": Bar(_disks.failing_calls, tries=100),
    "a disk that is full": Bar(_disks.full_disks, tries=10),
    "a power cut after each sync": Bar(_disks.power_cuts, tries=100),
    "damage in a checkpoint": Bar(_disks.damaged_checkpoints, tries=200),
    "damage in a cache": Bar(_disks.damaged_caches, tries=100),
    "damage under a run": Bar(_trials.damaged_runs, tries=20),
    "two runs in one folder": Bar(_trials.second_runs, tries=20),
    "a cache shared by readers, writers and kills": Bar(_trials.crowded_caches, tries=20, minutes=1),
    "hostile text as a recipe": Bar(_trials.fuzzed_texts, tries=10_000, minutes=10),
    "faults that others pass over": Bar(_planted.planted_faults, tries=14, suite=True),
    "canaries of code, paths, pages and secrets": Bar(_planted.canaries, tries=50, suite=True),
}
"""What is tried -> its bar."""


def no_fsync() -> None:
    """Nothing waits for the disk."""
    durable.sync = lambda path: None


def no_rename() -> None:
    """What was staged is copied to its name, file by file."""
    rename = os.rename

    def copied(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".staging-"):
            shutil.copytree(source, target)
        else:
            rename(source, target)

    os.rename = copied  # type: ignore[assignment]


def no_hash() -> None:
    """A checkpoint whose files have the right sizes is believed."""
    checkpoint.verify = checkpoint._glance


def no_lock() -> None:
    """Whoever comes may write."""
    durable._claim = lambda descriptor, path: None


MUTATIONS = {"fsync": no_fsync, "rename": no_rename, "hash": no_hash, "lock": no_lock}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10, help="how long; each trial runs once in any case")
    options.add_argument("--release", action="store_true", help="until each trial has reached its bar")
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--mutate", choices=MUTATIONS, help="take this safeguard away first")
    wanted = options.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for name in [name for name, bar in BARS.items() if bar.suite and not wanted.release]:
            del BARS[name]
        if refusal := _disks.refusal(Path(folder)):
            print(f"left out: {BARS.pop('a disk that is full') and refusal}")
        soak = prepared(Path(folder), random.Random(wanted.seed))
        if wanted.mutate:
            MUTATIONS[wanted.mutate]()
        soaked(soak, Path(folder), short if wanted.release else in_time(began + 60 * wanted.minutes))
    print(table())
    losses = sum(len(bar.shown.losses) for bar in BARS.values())
    print(f"\nseed {wanted.seed}, {(time.monotonic() - began) / 60:.1f} minutes, {losses} losses")
    return int(losses > 0)


def prepared(folder: Path, draw: random.Random) -> Soak:
    """A whole run to compare with, and one that was killed in its third stage."""
    whole = staged.place(folder / "whole")
    began = time.monotonic()
    assert staged.run(whole) == [0], staged.said(whole)
    soak = Soak(draw, whole, folder / "cut", time.monotonic() - began)
    soak.fresh(soak.cut)
    assert staged.run(soak.cut, plant=staged.signal_at(12, signal.SIGKILL)) == [-signal.SIGKILL]
    return soak


def short() -> str | None:
    """The first trial that is short of its bar."""
    return next((name for name, bar in BARS.items() if not bar.reached), None)


def in_time(end: float) -> Callable[[], str | None]:
    """Every trial once, then whichever has had the least time so far, until the time is up."""

    def due() -> str | None:
        name = min(BARS, key=lambda name: BARS[name].seconds)
        return name if BARS[name].turns == 0 or time.monotonic() < end else None

    return due


def soaked(soak: Soak, folder: Path, due: Callable[[], str | None]) -> None:
    """Trials, as long as one is due; what is lost is told at once."""
    while name := due():
        bar, began = BARS[name], time.monotonic()
        (room := folder / f"{name}-{bar.turns}").mkdir()
        tally = attempted(bar.trial, soak, room)
        for loss in tally.losses:
            print(f"LOST  {name}: {loss}", flush=True)
        shutil.rmtree(room, ignore_errors=True)
        bar.shown.tries += tally.tries
        bar.shown.losses += tally.losses
        bar.turns += 1
        bar.seconds += time.monotonic() - began
        if bar.reached:
            print(f"{name}: {bar.shown.tries:,} tries in {bar.seconds:.0f} s", file=sys.stderr, flush=True)


def attempted(trial: Trial, soak: Soak, room: Path) -> Tally:
    """What came of a trial; whatever goes wrong in it is a loss, told by its last line."""
    try:
        return trial(soak, room)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        return Tally(1, [f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}  {frame.line}  {said}"])


def table() -> str:
    """What was tried, in how many turns and how often, and how much was lost."""
    wide = max(map(len, BARS))
    lines = [f"{'what':{wide}}  turns   tries  losses"]
    for name, bar in BARS.items():
        lines.append(f"{name:{wide}}  {bar.turns:5,}  {bar.shown.tries:6,}  {len(bar.shown.losses):6,}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
