"""What the soak tries to lose a run with, one function each: kills, damage, crowds, hostile text.

Each takes the soak, which has the dice and a run that nothing has cut off, and an empty folder; it returns how often it
tried and, in words, what was lost. An `AssertionError` on the way is a loss too. The runs, the faults and the stores
are those of tests/.
"""

from __future__ import annotations

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
from datetime import timedelta
from pathlib import Path
from unittest import mock

import saving
import staged
import test_load
import test_store
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as some

from engine.checkpoint import lock
from engine.devices import processes
from engine.store import Store, own

SLOWEST = 1.0
"""Seconds of CPU in which any text has to be read or refused."""
LARGEST = 200 * 2**20
"""Bytes by which reading texts may make the process grow."""
MEETING = timedelta(seconds=30)
"""How long one process waits for another that never comes; users wait five minutes."""
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
        return staged.fresh(self.whole, root)

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
        for child in soak.draw.sample(children, soak.draw.randint(1, ranks)):
            os.kill(child, signal.SIGKILL)
        codes = staged.ends(children)
        hit = -signal.SIGKILL in codes
        tally.count(set(codes) <= {0, 3, -signal.SIGKILL}, f"a killed run's processes end with {codes}")
        tally.tries -= not hit  # it was over before the kill came
    loss = soak.finishes(root, ranks)
    tally.losses += [f"after {tally.tries} kills: {loss}"] if loss else []
    return tally


def killed_pairs(soak: Soak, folder: Path) -> Tally:
    """One that is left alone ends by itself, whether or not the two had met."""
    with mock.patch.object(processes, "TIMEOUT", MEETING):
        return killed_runs(soak, folder, ranks=2)


def changing_pairs(soak: Soak, folder: Path) -> Tally:
    """One process, then two, then one: each but the last is killed in some step, and the next goes on from there."""
    tally, root = Tally(), soak.fresh(folder)
    for ranks in (1, 2):
        hit = soak.draw.randrange(ranks)
        codes = staged.run(root, ranks=ranks, plant=staged.signal_at(soak.draw.randint(2, 8), signal.SIGKILL, hit))
        if codes != [-signal.SIGKILL if rank == hit else 3 for rank in range(ranks)]:
            tally.losses.append(f"killed on {ranks}, the processes end with {codes}")
    loss = soak.finishes(root)
    tally.count(not loss, f"from 1 to 2 to 1 processes: {loss}")
    return tally


def damaged_runs(soak: Soak, folder: Path) -> Tally:
    """A run that was cut off finds a bit of its newest checkpoint flipped, or a file gone; the same in its cache."""
    tally, root = Tally(), folder / "run"
    shutil.copytree(soak.cut, root)
    checkpoint = max(staged.folder(root).glob("checkpoints/stage*"), key=_step)
    caches = [path for path in sorted((root / "runs/.cache").rglob("*.rows")) if path.stat().st_size]
    for path in (soak.draw.choice(sorted(checkpoint.iterdir())), soak.draw.choice(caches)):
        if soak.draw.random() < 0.3:
            path.unlink()
        else:
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


def same_rows(found: Store, rows: list[list[torch.Tensor]]) -> bool:
    pairs = [(found.row(cut, index), row) for index, each in enumerate(rows) for cut, row in enumerate(each)]
    return all(torch.equal(back, row) for back, row in pairs)


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
                assert same_rows(found, expected)
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
