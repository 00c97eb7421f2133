"""Activations on disk: what is read is what was written, and whatever isn't is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from engine import store
from engine.errors import RunError
from engine.keeping import durable
from engine.store import DTYPES, Dtype, Store, TooLargeError, Writer, padded

CUTS = ("encoder", "decoder")


def rows(count: int = 20, seed: int = 0) -> list[list[Tensor]]:
    """Two cuts an example: tokens of 8 numbers, and one map whose last axis is what differs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [[torch.randn(n, 8, generator=generator), torch.randn(3, n, generator=generator)] for n in lengths]


def written(folder: Path, name: str = "a", dtype: Dtype = "float32", seed: int = 0) -> list[list[Tensor]]:
    examples = rows(seed=seed)
    with Writer(folder, name, CUTS, len(examples), dtype) as writer:
        for index in reversed(range(len(examples))):
            writer.put(index, examples[index])
        writer.publish()
    return examples


def opened(folder: Path, name: str = "a") -> Store:
    found = Store.open(folder, name)
    assert found is not None
    return found


def error(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 250)]
)
def test_rows_of_any_length_come_back(tmp_path: Path, dtype: Dtype, most: float):
    examples = written(tmp_path / "s", dtype=dtype)
    found = opened(tmp_path / "s")
    assert (found.count, found.cuts, found.dtype) == (20, CUTS, dtype)
    for index, example in enumerate(examples):
        for cut, row in enumerate(example):
            back = found.row(cut, index)
            assert back.shape == row.shape
            assert error(back, row) <= most * float(row.abs().max())
    numbers = sum(row.numel() for example in examples for row in example)
    assert (
        sum(path.stat().st_size for path in (tmp_path / "s" / "a").glob("*.rows")) == numbers * DTYPES[dtype].itemsize
    )


@given(shapes=some.lists(some.integers(0, 5), min_size=1, max_size=6), left=some.booleans(), width=some.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_padding_puts_zeros_where_no_row_is(shapes: list[int], left: bool, width: int):
    batch = padded([torch.ones(length, 2) for length in shapes], width, left)
    assert batch.shape == (len(shapes), max(width, *shapes), 2)
    for place, length in zip(batch, shapes, strict=True):
        mine = place[len(place) - length :] if left else place[:length]
        assert mine.sum() == place.sum() == 2 * length


def test_bytes_are_the_same_whoever_writes_them(tmp_path: Path):
    for folder in ("s", "t"):
        written(tmp_path / folder)
    contents = [{f.name: f.read_bytes() for f in (tmp_path / folder / "a").iterdir()} for folder in ("s", "t")]
    assert contents[0] == contents[1]


def test_every_flipped_byte_of_every_file_makes_it_missing(tmp_path: Path):
    written(tmp_path / "s")
    names = sorted(path.name for path in (tmp_path / "s" / "a").iterdir() if path.stat().st_size)
    assert len(names) == 5
    for name in names:
        size = (tmp_path / "s" / "a" / name).stat().st_size
        for place in {0, size // 3, size - 1}:
            path = tmp_path / "s" / "a" / name
            content = bytearray(path.read_bytes())
            content[place] ^= 1
            path.write_bytes(content)
            assert Store.open(tmp_path / "s", "a") is None
            assert not path.exists()
            written(tmp_path / "s")
    opened(tmp_path / "s")


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "link", "renamed"])
def test_what_is_damaged_is_missing_and_can_be_written_again(tmp_path: Path, damage: str):
    written(tmp_path / "s")
    path = tmp_path / "s" / "a" / "cut0.rows"
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    elif damage == "gone":
        path.unlink()
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.parent.rename(tmp_path / "s" / "b")
    assert Store.open(tmp_path / "s", "b" if damage == "renamed" else "a") is None
    written(tmp_path / "s")
    opened(tmp_path / "s")


def test_a_store_has_every_row_once(tmp_path: Path):
    example = rows(1)[0]
    with Writer(tmp_path / "s", "a", CUTS, 2) as writer:
        writer.put(0, example)
        with pytest.raises(ValueError, match="row 1 was never written"):
            writer.publish()
    with Writer(tmp_path / "s", "a", CUTS, 2) as writer:
        writer.put(0, example)
        with pytest.raises(ValueError, match="row 0 was written before"):
            writer.put(0, example)
    assert list((tmp_path / "s").iterdir()) == []


def test_what_float16_cant_hold_is_refused(tmp_path: Path):
    for dtype in ("float16", "int8"):
        with Writer(tmp_path / "s", "a", ("x",), 1, dtype) as writer, pytest.raises(TooLargeError):
            writer.put(0, [torch.tensor([1.0, 1e6 if dtype == "float16" else float("inf")])])
    with Writer(tmp_path / "s", "a", ("x",), 1, "float32") as writer:
        writer.put(0, [torch.tensor([1.0, float("inf")])])
        assert writer.publish().row(0, 0).tolist() == [1.0, float("inf")]


def test_nobody_else_can_read_or_write_it(tmp_path: Path):
    written(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "s" / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be made"):
        Writer(tmp_path / "file", "a", CUTS, 1)


def test_usage_eviction_and_clearing(tmp_path: Path):
    for age, name in enumerate(("old", "middle", "new")):
        written(tmp_path / "s", name)
        os.utime(tmp_path / "s" / name / "header.json", (age, age))
    each = store.usage(tmp_path / "s") // 3
    kept = opened(tmp_path / "s", "old")  # now it was used last
    assert store.evict(tmp_path / "s", 10 * each) == []
    assert store.evict(tmp_path / "s", 2 * each + 100) == ["middle"]
    assert store.evict(tmp_path / "s", 0, keep=["new"]) == ["old"]
    assert torch.equal(kept.row(0, 0), rows()[0][0])  # a reader goes on reading
    assert store.clear(tmp_path / "s") == pytest.approx(each, abs=50)
    assert store.usage(tmp_path / "s") == 0


def test_one_that_is_missing_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its writer may give it its name at this very moment."""
    monkeypatch.setattr("engine.store._take_away", lambda *_: pytest.fail("there was nothing to take away"))
    assert Store.open(tmp_path, "a") is None


def test_a_damaged_one_is_taken_away_and_not_the_one_that_has_replaced_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = written(tmp_path)
    fingerprint = durable.fingerprint

    def replaced(path: Path) -> dict[str, object]:
        monkeypatch.setattr(durable, "fingerprint", fingerprint)
        durable.retire(tmp_path / "a")
        written(tmp_path)
        return {"size": 0, "sha256": ""}

    monkeypatch.setattr(durable, "fingerprint", replaced)
    assert Store.open(tmp_path, "a") is None
    found = Store.open(tmp_path, "a")
    assert found is not None
    assert torch.equal(found.row(0, 3), expected[3][0])


def test_a_damaged_winner_of_a_race_is_replaced(tmp_path: Path):
    with Writer(tmp_path, "a", ["cut"], 1) as slow:
        slow.put(0, [torch.ones(2)])
        written(tmp_path)
        (tmp_path / "a" / "header.json").write_text("{}")
        assert torch.equal(slow.publish().row(0, 0), torch.ones(2))


def test_a_lost_race_ends_with_the_winners_store(tmp_path: Path):
    examples = rows()
    with Writer(tmp_path / "s", "a", CUTS, len(examples)) as slow:
        for index, example in enumerate(examples):
            slow.put(index, example)
        written(tmp_path / "s")
        assert torch.equal(slow.publish().row(0, 3), examples[3][0])
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["a"]


def test_a_living_writer_is_left_alone_and_a_killed_one_swept_away(tmp_path: Path):
    with Writer(tmp_path / "s", "a", CUTS, 1) as living:
        assert script(tmp_path / "s", KILLED).returncode == -signal.SIGKILL
        assert len(list((tmp_path / "s").glob(".staging-*"))) == 2
        store.own(tmp_path / "s")
        assert list((tmp_path / "s").glob(".staging-*")) == [living.staging]


START = """
import os, random, signal, sys, time, traceback
from pathlib import Path
sys.path[:0] = [TESTS]
import torch
from test_store import CUTS, rows, written
from engine.store import Store, Writer
torch.set_num_threads(1)
folder = Path(FOLDER)
"""
KILLED = """
with Writer(folder, "a", CUTS, 2) as writer:
    writer.put(0, rows(1)[0])
    os.kill(os.getpid(), signal.SIGKILL)
"""
CROWD = """
expected = rows()

def work(reads):
    for turn in range(30):
        name = f"n{turn % 3}"
        if reads and (found := Store.open(folder, name)) is not None:
            for index, example in enumerate(expected):
                assert all(torch.equal(found.row(cut, index), row) for cut, row in enumerate(example))
        elif not reads:
            written(folder, name)

def started(reads):
    if child := os.fork():
        return child
    try:
        work(reads)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)

workers = [started(reads) for reads in (False, False, True)]
for seed in range(8):
    victim = started(False)
    time.sleep(random.Random(seed).uniform(0.0, 0.2))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
sys.exit(any(os.waitpid(worker, 0)[1] for worker in workers))
"""


def script(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    start = START.replace("TESTS", repr(str(Path(__file__).parent))).replace("FOLDER", repr(str(folder)))
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)


def test_writers_readers_and_kills_at_once(tmp_path: Path):
    """Two write, one reads, others are killed while they write: a reader only ever sees whole stores."""
    done = script(tmp_path / "s", CROWD)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "s").glob(".staging-*"):
        os.utime(path, (0, 0))  # one killed before it could claim its folder, or after, is swept away in an hour
    store.own(tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["n0", "n1", "n2"]
    assert torch.equal(opened(tmp_path / "s", "n1").row(1, 5), rows()[5][1])
