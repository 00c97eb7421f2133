"""What the soak tries to lose a save with: kills inside of it, failing calls, full disks, power cuts, damage.

As in `_trials`, each takes the soak and an empty folder, and returns how often it tried and what was lost.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import saving
import staged
import test_checkpoint_faults as faults
import test_store
from _power import Disk
from _trials import Soak, Tally, same_rows

from engine.checkpoint import newest
from engine.errors import ENVIRONMENT, NOTHING_TO_RESUME, RunError
from engine.store import Store

PAGE = 4096
"""Bytes that a disk in memory gives at once."""


def killed_saves(soak: Soak, folder: Path) -> Tally:
    """A process that saves all the time is killed at any time, and another at one change of the disk."""
    tally, newest_step = Tally(), 1
    saving.publish(folder / "often", 1, size=256)
    for _ in range(5):
        lost = _killed_while_saving(folder / "often", newest_step, soak.draw.uniform(0.001, 0.04))
        tally.count(not lost, lost)
        newest_step = saving.found(folder / "often")[0].state["step"]
    for number in soak.draw.sample(range(1, 60), 5):
        at = folder / str(number)
        saving.publish(at, 2)
        code = saving.in_child(lambda at=at, number=number: faults.save_and_die(at, number))
        last, skipped = saving.found(at)
        whole = last.state["step"] in (2, 3) and not skipped and faults.goes_on(at)
        tally.count(whole and code in (0, -signal.SIGKILL), f"killed at change {number}: {code} {skipped}")
    return tally


def _killed_while_saving(folder: Path, first: int, after: float) -> str:
    if (child := os.fork()) == 0:
        for step in range(first + 1, 10**6):
            saving.publish(folder, step, size=256)
            faults.rotate(folder, keep=2)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last, skipped = saving.found(folder)
    lost = [*skipped, *([] if last.state["step"] >= first else [f"step {first} is gone"])]
    return "; ".join(lost)


def failing_calls(soak: Soak, folder: Path) -> Tally:
    """One call of the disk fails while a checkpoint is saved."""
    tally = Tally()
    for number in soak.draw.sample(range(1, 50), 8):
        code, functions = soak.draw.choice(
            [(errno.ENOSPC, saving.CHANGES), (errno.EDQUOT, saving.CHANGES), (errno.EIO, saving.CHANGES | saving.READS)]
        )
        at = folder / str(number)
        saving.publish(at, 2)
        failed, error = faults.fails(at, number, code, functions - {"close"})
        last, skipped = saving.found(at)
        saved = last.state["step"] == 3 or (error is not None and error.exit_code in (3, 6))
        kept = saved and not skipped and faults.goes_on(at)
        tally.count(kept, f"{errno.errorcode[code]} at call {number}: step {last.state['step']}, {skipped}")
        tally.tries -= not failed  # the save had fewer calls than that
    return tally


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Inside, a folder is a disk in memory, of so many bytes; it needs root on Linux."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refusal(folder: Path) -> str:
    """Why there can be no small disk here, or nothing."""
    try:
        with small_disk(folder, PAGE):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"only root on Linux can mount a disk that is small enough to fill ({error})"


def full_disks(soak: Soak, folder: Path) -> Tally:
    """A run on a disk of any size up to what it takes: it ends in words, and with more room it goes on."""
    tally, root = Tally(), soak.fresh(folder)
    (disk := root / "runs").mkdir()
    pages = sum(-(-path.stat().st_size // PAGE) for path in (soak.whole / "runs").rglob("*") if path.is_file())
    size = PAGE * soak.draw.randrange(1, pages)
    with small_disk(disk, size):
        codes = staged.run(root)
        if codes == [0]:
            return tally
        said, saved = staged.said(root), staged.folder(root) / "checkpoints"
        words = codes == [ENVIRONMENT] and "No space left on device" in said.splitlines()[-1]
        skipped: list[str] = []
        newest(saved, skipped)
        tally.count(words and not skipped, f"{size:,} bytes: ends with {codes}, {skipped}: {said[-300:]}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        loss = soak.finishes(root)
        tally.losses += [f"{size:,} bytes, then more: {loss}"] if loss else []
    return tally


def power_cuts(soak: Soak, folder: Path) -> Tally:
    """The power fails after each sync of a save, a rotation and a store, and what was never synced is gone."""
    tally, live = Tally(), folder / "live"
    live.mkdir()
    saving.publish(live / "run", 2)
    disk = Disk(live)
    with disk.watching():
        saving.publish(live / "run", 3)
        published = len(disk.cuts)
        faults.rotate(live / "run", keep=1)
        rows = test_store.written(live / "cache", seed=soak.draw.randrange(1000))
    for number, memory in enumerate(disk.cuts, 1):
        at = memory.restore(folder / str(number))
        skipped: list[str] = []
        last = newest(at / "run", skipped)
        step = last.state["step"] if last else 0
        least = 3 if number >= max(published, 1) else 2
        tally.count(step >= least and not skipped, f"power cut {number}: step {step}, {'; '.join(skipped)}")
    found = Store.open(at / "cache", "a")
    tally.count(found is not None and same_rows(found, rows), "a store that was published is gone after a power cut")
    return tally


def damaged_checkpoints(soak: Soak, folder: Path) -> Tally:
    """A run's checkpoints, newest first: each file of each once gone, and ten times with another byte at random."""
    tally = Tally()
    shutil.copytree(staged.folder(soak.cut) / "checkpoints", folder, dirs_exist_ok=True)
    while whole := newest(folder):
        for path in sorted(whole.path.iterdir()):
            content = path.read_bytes()
            path.unlink()
            tally.count(_falls_back(folder, path), f"{path.name} of {whole.name} is gone, and was not missed")
            for _ in range(10):
                path.write_bytes(content)
                saving.flip(path, at := soak.draw.randrange(len(content)), soak.draw.randrange(8))
                tally.count(_falls_back(folder, path), f"byte {at} of {path.name} of {whole.name} was not seen")
            path.write_bytes(content)
        shutil.rmtree(whole.path)
    return tally


def _falls_back(folder: Path, damaged: Path) -> bool:
    """Whether the newest checkpoint is passed over with a word on its damaged file; where it is the last, in words."""
    told: list[str] = []
    alone = len(saving.names(folder)) == 1
    try:
        found = newest(folder, told)
    except RunError as error:
        told, found = str(error).splitlines()[1:], None
        alone = alone and error.exit_code == NOTHING_TO_RESUME
    named = [line.startswith(f"{damaged.parent.name} skipped: ") and damaged.name in line for line in told]
    return named == [True] and (alone if found is None else found.path != damaged.parent)


def damaged_caches(soak: Soak, folder: Path) -> Tally:
    """One bit of every file of a store of activations, at random places: it's missing, and written once more."""
    tally = Tally()
    test_store.written(folder, dtype="int8")
    for name in sorted(path.name for path in (folder / "a").iterdir() if path.stat().st_size):
        path = folder / "a" / name
        saving.flip(path, position := soak.draw.randrange(path.stat().st_size), soak.draw.randrange(8))
        tally.count(Store.open(folder, "a") is None, f"a bit of byte {position} of {name} was not seen")
        shutil.rmtree(folder / "a", ignore_errors=True)
        rows = test_store.written(folder)
        found = Store.open(folder, "a")
        tally.losses += [] if found and same_rows(found, rows) else ["a store can't be written again"]
        shutil.rmtree(folder / "a")
        test_store.written(folder, dtype="int8")
    return tally
