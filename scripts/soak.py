"""Try to lose work for as long as you like: kills, failing disks, power cuts, flipped bytes, crowds, hostile text.

    .venv/bin/python scripts/soak.py [--minutes 10] [--seed 7] [--mutate fsync|rename|hash|lock]

Prints a table of what was tried, how often, and what was lost; the exit code is 1 if anything was. The dice follow from
the seed, the moments that kills hit from the machine. `--mutate` takes one safeguard away, and has to turn it red.
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
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402, F401  no network and one thread a process, before anything reads it

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)

import staged  # noqa: E402
from _trials import TRIALS, Soak, Tally, Trial  # noqa: E402

from engine import checkpoint  # noqa: E402
from engine.keeping import durable  # noqa: E402


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
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--mutate", choices=MUTATIONS, help="take this safeguard away first")
    wanted = options.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = prepared(Path(folder), random.Random(wanted.seed))
        if wanted.mutate:
            MUTATIONS[wanted.mutate]()
        tallies = soaked(soak, Path(folder), began + 60 * wanted.minutes)
    print(table(tallies))
    losses = [loss for tally in tallies.values() for loss in tally.losses]
    print(f"\nseed {wanted.seed}, {(time.monotonic() - began) / 60:.1f} minutes, {len(losses)} losses")
    return int(bool(losses))


def prepared(folder: Path, draw: random.Random) -> Soak:
    """A whole run to compare with, and one that was killed in its third stage."""
    whole = staged.place(folder / "whole")
    began = time.monotonic()
    assert staged.run(whole) == [0], staged.said(whole)
    soak = Soak(draw, whole, folder / "cut", time.monotonic() - began)
    soak.fresh(soak.cut)
    assert staged.run(soak.cut, plant=staged.signal_at(12, signal.SIGKILL)) == [-signal.SIGKILL]
    return soak


def soaked(soak: Soak, folder: Path, end: float) -> dict[str, Tally]:
    """Every trial once, then whichever has had the least time so far, until the time is up."""
    tallies: dict[str, Tally] = {name: Tally() for name in TRIALS}
    spent: dict[str, float] = defaultdict(float)
    turns = 0
    while turns < len(TRIALS) or time.monotonic() < end:
        name = min(TRIALS, key=lambda name: spent[name])
        began = time.monotonic()
        (room := folder / f"turn-{turns}").mkdir()
        tally = attempted(TRIALS[name], soak, room)
        tallies[name].tries += tally.tries
        tallies[name].losses += tally.losses
        for loss in tally.losses:
            print(f"LOST  {name}: {loss}", flush=True)
        shutil.rmtree(room, ignore_errors=True)
        spent[name] += time.monotonic() - began
        turns += 1
    return tallies


def attempted(trial: Trial, soak: Soak, room: Path) -> Tally:
    """What came of a trial; whatever goes wrong in it is a loss, told by its last line."""
    try:
        return trial(soak, room)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        return Tally(1, [f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}  {frame.line}  {said}"])


def table(tallies: dict[str, Tally]) -> str:
    """What was tried, how often, and how much was lost."""
    wide = max(map(len, tallies))
    lines = [f"{'what':{wide}}   tries  losses"]
    lines += [f"{name:{wide}}  {tally.tries:6,}  {len(tally.losses):6,}" for name, tally in tallies.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
