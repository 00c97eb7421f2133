"""What the soak tries to lose work with, one function each: kills, failing disks, power cuts, flipped bytes, crowds.

Each takes the soak, which has the dice and a run that nothing has cut off, and an empty folder; it returns how often it
tried and, in words, what was lost. An `AssertionError` on the way is a loss too. The runs, the faults and the stores
are those of tests/.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import saving
import staged
import test_checkpoint_faults as faults
import test_load
import test_store
import torch
from _power import Disk
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as some

from engine.checkpoint import lock, newest
from engine.store import Store, own

SLOWEST = 1.0
"""Seconds of CPU in which any text has to be read or refused."""
LARGEST = 200 * 2**20
"""Bytes by which reading texts may make the process grow."""
STORES = 300
"""Names in a crowded cache, written by all who write and read by all who read."""


@dataclass
class Tally:
    """How often something was tried, and what was lost."""

    tries: int = 0
    losses: list[str] = field(default_factory=list)

    def count(self, kept: bool, loss: str) -> None:
        """One more try, and its loss unless everything was kept."""
        self.tries += 1
        self.losses += [] if kept else [loss]


@dataclass(frozen=True)
class Soak:
    """What all trials share."""

    draw: random.Random
    whole: Path
    """A run that nothing has cut off."""
    cut: Path
    """The same run, killed on its way: with several checkpoints and a cache."""
    longest: float
    """Seconds that the whole run took."""

    def fresh(self, root: Path) -> Path:
        """The place of the whole run without the run."""
        for part in ("model", "rows"):
            shutil.copytree(self.whole / part, root / part)
        shutil.copy(self.whole / "staged.yaml", root)
        return root

    def same(self, root: Path) -> str:
        """What differs between a run and the one that nothing has cut off; empty if nothing does."""
        one, other = (sha(staged.folder(each) / "model/model.safetensors") for each in (root, self.whole))
        return "" if one == other else f"the weights' sha256 is {one[:12]} and not {other[:12]}"

    def finishes(self, root: Path, ranks: int = 1) -> str:
        """What is wrong with how a run ends that is started once more; empty if nothing is."""
        codes = staged.run(root, ranks=ranks)
        return self.same(root) if codes == [0] * ranks else f"ends with {codes}: {staged.said(root)[-300:]}"


Trial = Callable[[Soak, Path], Tally]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "that of no file"


def killed_runs(soak: Soak, folder: Path, ranks: int = 1) -> Tally:
    """Three kills at any time, each followed by the same command; of two processes one is killed, or both."""
    tally, root = Tally(), soak.fresh(folder)
    for _ in range(3):
        children = staged.begin(root, ranks=ranks)
        time.sleep(soak.draw.uniform(0.1, soak.longest * (1 + ranks) / 2))
        # before they have met, one waits for the other as long as its launcher lets it
        least = 1 if staged.folder(root).exists() else ranks
        for child in soak.draw.sample(children, soak.draw.randint(least, ranks)):
            os.kill(child, signal.SIGKILL)
        codes = staged.ends(children)
        hit = -signal.SIGKILL in codes
        tally.count(set(codes) <= {0, 3, -signal.SIGKILL}, f"a killed run's processes end with {codes}")
        tally.tries -= not hit  # it was over before the kill came
    loss = soak.finishes(root, ranks)
    tally.losses += [f"after {tally.tries} kills: {loss}"] if loss else []
    return tally


def killed_pairs(soak: Soak, folder: Path) -> Tally:
    return killed_runs(soak, folder, ranks=2)


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
    tally.count(found is not None and _same_rows(found, rows), "a store that was published is gone after a power cut")
    return tally


def _same_rows(found: Store, rows: list[list[torch.Tensor]]) -> bool:
    pairs = [(found.row(cut, index), row) for index, each in enumerate(rows) for cut, row in enumerate(each)]
    return all(torch.equal(back, row) for back, row in pairs)


def flipped_checkpoints(soak: Soak, folder: Path) -> Tally:
    """One bit of every file of a checkpoint, at random places."""
    tally = Tally()
    for step in (1, 2):
        saving.publish(folder, step, size=32)
    for path in sorted((folder / "step-000002").iterdir()):
        content = path.read_bytes()
        for _ in range(10):
            saving.flip(path, position := soak.draw.randrange(len(content)), soak.draw.randrange(8))
            last, skipped = saving.found(folder)
            seen = last.name == "step-000001" and len(skipped) == 1 and path.name in skipped[0]
            tally.count(seen, f"a bit of byte {position} of {path.name} was not seen")
            path.write_bytes(content)
    return tally


def flipped_caches(soak: Soak, folder: Path) -> Tally:
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
        tally.losses += [] if found and _same_rows(found, rows) else ["a store can't be written again"]
        shutil.rmtree(folder / "a")
        test_store.written(folder, dtype="int8")
    return tally


def flipped_runs(soak: Soak, folder: Path) -> Tally:
    """A run that was cut off finds a bit of its newest checkpoint flipped, and one of its cache."""
    tally, root = Tally(), folder / "run"
    shutil.copytree(soak.cut, root)
    checkpoint = max(staged.folder(root).glob("checkpoints/stage*"), key=_step)
    caches = [path for path in sorted((root / "runs/.cache").rglob("*.rows")) if path.stat().st_size]
    for path in (soak.draw.choice(sorted(checkpoint.iterdir())), soak.draw.choice(caches)):
        saving.flip(path, soak.draw.randrange(path.stat().st_size), soak.draw.randrange(8))
    loss = soak.finishes(root)
    said = f"{checkpoint.name} skipped: " in staged.said(root)
    tally.count(said and not loss, loss or "a damaged checkpoint was passed over in silence")
    return tally


def _step(checkpoint: Path) -> int:
    return json.loads((checkpoint / "state.json").read_bytes())["step"]


def second_runs(soak: Soak, folder: Path) -> Tally:
    """While a run is under way the same command is turned away at once; after a kill it isn't."""
    tally, root = Tally(), soak.fresh(folder)

    def second() -> None:
        began = time.monotonic()
        codes = staged.run(root, plant=lambda _: signal.alarm(60))
        (root / "second").write_text(json.dumps([codes, time.monotonic() - began]))

    where = soak.draw.choice(list(staged.steps(soak.whole)))
    first = staged.run(root, plant=staged.at_step(where, second))
    codes, seconds = json.loads((root / "second").read_text())
    loss = soak.same(root) if first == [0] else f"the first run ends with {first}"
    tally.count(codes == [4], f"a second run in the folder of a first ends with {codes}")
    tally.count(not loss, f"a second run was there: {loss}")
    tally.count(seconds < 10, f"a second run was turned away after {seconds:.0f} s")
    if (holder := os.fork()) == 0:
        with lock(folder / "held"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(holder, 0)
    tally.count(saving.in_child(lambda: lock(folder / "held").__enter__()) == 0, "a lock outlives its process")
    return tally


def crowded_caches(soak: Soak, folder: Path, seconds: float = 3.0) -> Tally:
    """Two write, two read, and others are killed while they write, all in one cache."""
    tally, cache, end = Tally(), folder / "cache", time.monotonic() + seconds
    workers = [_worker(folder, cache, number, end) for number in range(4)]
    while time.monotonic() < end:
        victim = _worker(folder, cache, 0, end)
        time.sleep(soak.draw.uniform(0.0, 0.2))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        tally.tries += 1
    codes = staged.ends(workers)
    tally.losses += [f"one of a cache's users ends with {code}" for code in codes if code]
    tally.tries += sum(int((folder / f"reads-{number}").read_text()) for number in (2, 3))
    for path in cache.glob(".staging-*"):
        os.utime(path, (0, 0))  # what was killed before it could claim its folder is swept away in an hour
    own(cache)
    left = {path.name for path in cache.iterdir()} - {f"n{number}" for number in range(STORES)}
    tally.losses += [f"killed writers leave {left}"] if left else []
    return tally


def _worker(folder: Path, cache: Path, number: int, end: float) -> int:
    """A process that writes stores until the end, or reads them and compares: the numbers 0 and 1 write."""
    if child := os.fork():
        return child
    reads, code = 0, 1
    try:
        expected = test_store.rows()
        for turn in range(10**9):
            if time.monotonic() > end:
                break
            name = f"n{turn % STORES}"
            if number < 2:
                test_store.written(cache, name)
            elif (found := Store.open(cache, name)) is not None:
                assert _same_rows(found, expected)
                reads += 1
        (folder / f"reads-{number}").write_text(str(reads))
        code = 0
    finally:
        os._exit(code)


def fuzzed_texts(soak: Soak, folder: Path) -> Tally:
    """Recipes with bits of YAML and bytes thrown in: read, or refused in words on one screen, and soon."""
    tally, before = Tally(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @seed(soak.draw.getrandbits(32))
    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(text=some.sampled_from(test_load.CORPUS) | some.binary(max_size=80), cuts=test_load.CUTS)
    def attempt(text: bytes, cuts: list[tuple[float, bytes, int]]) -> None:
        for share, bit, length in cuts:
            at = int(share * len(text))
            text = text[:at] + bit + text[at + length :]
        (folder / "fuzzed.yaml").write_bytes(text)
        tally.tries += 1
        began = time.process_time()
        told = test_load.attempt(folder / "fuzzed.yaml")
        assert time.process_time() - began < SLOWEST, text
        assert len(told) <= 20, told
        assert all(line.isprintable() for line in told), told

    attempt()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    tally.losses += [f"reading texts takes {grown:,} bytes"] if grown > LARGEST else []
    return tally


TRIALS: dict[str, Trial] = {
    "SIGKILL at any time of a run": killed_runs,
    "SIGKILL at any time of two processes": killed_pairs,
    "SIGKILL inside of a save": killed_saves,
    "a disk that fails at the Nth call": failing_calls,
    "a power cut after each sync": power_cuts,
    "a bit flipped in a checkpoint": flipped_checkpoints,
    "a bit flipped in a cache": flipped_caches,
    "bits flipped under a run": flipped_runs,
    "two runs in one folder": second_runs,
    "a cache shared by readers, writers and kills": crowded_caches,
    "hostile text as a recipe": fuzzed_texts,
}
"""What is tried -> the trial."""
