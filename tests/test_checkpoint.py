"""Checkpoints as they are meant to be, and damaged: what isn't whole is named and passed over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import flip, found, names, publish, tensors

from engine import checkpoint
from engine.checkpoint import DamagedError, clear, newest, rotate, verify
from engine.errors import GUARD, NOTHING_TO_RESUME, RunError
from engine.keeping.durable import JSON_LIMIT, json_bytes, json_digest

FILES = ["MANIFEST.json", "moments.safetensors", "state.json", "weights.safetensors"]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        publish(tmp_path / "two", step)
    return tmp_path / "two"


def test_what_is_read_is_what_was_published(tmp_path: Path):
    shared = torch.arange(12.0).reshape(3, 4)
    weights = {
        "whole": shared,
        "view": shared[1:],
        "turned": shared.t(),
        "tied": shared,
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    state = {"step": 5, "stage": {"name": "top", "index": 1}, "best": 0.1 + 0.2, "names": ["b", "a"], "none": None}
    path = checkpoint.publish(tmp_path / "deep" / "run", "best-5", {"weights": weights, "moments": {}}, state)
    shared.zero_()
    last = newest(tmp_path / "deep" / "run")
    assert last is not None
    assert (last.path, last.name, last.state, last.groups) == (path, "best-5", state, ("moments", "weights"))
    read = last.read("weights")
    assert list(last.state) == list(state)
    assert last.read("moments") == {}
    assert {name: (each.dtype, each.shape) for name, each in read.items()} == {
        name: (each.dtype, each.shape) for name, each in weights.items()
    }
    assert torch.equal(read["turned"], torch.arange(12.0).reshape(3, 4).t())
    assert torch.equal(read["view"], torch.arange(4.0, 12.0).reshape(2, 4))
    assert torch.equal(read["half"].view(torch.int16), weights["half"].view(torch.int16))
    with pytest.raises(KeyError, match="holds no `best`, only moments, weights"):
        last.read("best")


def test_tensors_outlive_their_checkpoint(two: Path):
    read = found(two)[0].read("weights")
    clear(two)
    assert newest(two) is None
    assert torch.equal(read["layer.weight"], torch.full((4, 4), 2.0))


def test_newest_goes_by_step_then_by_publishing_never_by_time(tmp_path: Path):
    assert newest(tmp_path / "nowhere") is None
    for step in (9, 10, 2):
        publish(tmp_path, step)
    os.utime(tmp_path / "step-000002", (2**33, 2**33))
    assert found(tmp_path)[0].name == "step-000010"
    checkpoint.publish(tmp_path, "a-stage-end", tensors(10), {"step": 10})
    assert found(tmp_path)[0].name == "a-stage-end"


def test_rotation_keeps_the_newest_the_kept_and_what_it_cannot_read(tmp_path: Path):
    for step in range(1, 8):
        publish(tmp_path, step, kept=step in (1, 4))
    (tmp_path / "step-000002" / "state.json").unlink()
    assert rotate(tmp_path, keep=2) == ["step-000005", "step-000003"]
    assert names(tmp_path) == [f"step-00000{step}" for step in (1, 2, 4, 6, 7)]
    assert rotate(tmp_path, keep=1, protected=lambda state: state["step"] == 6) == ["step-000004", "step-000001"]
    assert rotate(tmp_path, keep=1) == ["step-000006"]
    assert rotate(tmp_path / "nowhere", keep=1) == []
    with pytest.raises(ValueError, match="at least one"):
        rotate(tmp_path, keep=0)


def test_rotation_never_counts_a_damaged_newest(tmp_path: Path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    flip(tmp_path / "step-000003" / "weights.safetensors", -1)
    assert rotate(tmp_path, keep=1) == ["step-000001"]
    assert names(tmp_path) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".staging-x", "a\0b", "a\nb", "a" * 101])
def test_a_name_stays_in_the_folder(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="is no name for a checkpoint"):
        checkpoint.publish(tmp_path, name, tensors(1), {"step": 1})
    with pytest.raises(ValueError, match="is no name for a group"):
        checkpoint.publish(tmp_path, "fine", {name: {}}, {"step": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra",
    [
        {"step": -1},
        {"step": True},
        {"step": 1.0},
        {"x": float("nan")},
        {"x": {1: 2}},
        {"x": (1, 2)},
        {"x": {1}},
        {1: 2},
    ],
)
def test_a_state_that_would_not_read_the_same_is_refused(tmp_path: Path, extra: dict[Any, Any]):
    with pytest.raises(ValueError, match="a state is plain JSON with a whole number `step`"):
        checkpoint.publish(tmp_path, "fine", tensors(1), {"step": 1} | extra)
    assert list(tmp_path.iterdir()) == []


def test_an_intact_checkpoint_is_never_overwritten_a_damaged_one_is(two: Path):
    with pytest.raises(RunError, match="step-000002: is there already and intact") as refused:
        publish(two, 2)
    assert refused.value.exit_code == GUARD
    (two / "step-000002" / "moments.safetensors").unlink()
    publish(two, 2)
    assert found(two)[0].name == "step-000002"
    assert names(two) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_named_and_passed_over(two: Path, file: str):
    path = two / "step-000002" / file
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position, bit=position % 8)
        last, skipped = found(two)
        assert last.name == "step-000001", f"byte {position} of {file}"
        assert len(skipped) == 1
        assert skipped[0].startswith(f"step-000002 skipped: {file} ")
        path.write_bytes(content)
    assert found(two) == (verify(two / "step-000002"), [])


def as_link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / path.name
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WAYS = [Path.unlink, as_link, as_pipe, as_folder]
WAYS += [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes() + b" ")]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", WAYS)
def test_a_file_that_is_gone_or_something_else_is_named(two: Path, file: str, damage: Callable[[Path], object]):
    damage(two / "step-000002" / file)
    if file == "MANIFEST.json" and (two / "step-000002" / file).is_file() and damage is WAYS[-1]:
        assert found(two)[0].name == "step-000002"
        return
    last, skipped = found(two)
    assert last.name == "step-000001"
    assert skipped[0].startswith(f"step-000002 skipped: {file} ")


def test_a_linked_checkpoint_is_passed_over(two: Path):
    shutil.move(two / "step-000002", two.parent / "elsewhere")
    (two / "step-000002").symlink_to(two.parent / "elsewhere")
    last, skipped = found(two)
    assert (last.name, skipped) == ("step-000001", ["step-000002 skipped: it is a symbolic link"])
    publish(two, 2)
    assert verify(two.parent / "elsewhere").state == {"step": 2}
    assert not (two / "step-000002").is_symlink()


def test_nothing_intact_is_an_error_that_names_each(two: Path):
    (two / "step-000001" / "MANIFEST.json").unlink()
    flip(two / "step-000002" / "weights.safetensors", -1)
    with pytest.raises(RunError, match="nothing to resume") as nothing:
        newest(two)
    assert nothing.value.exit_code == NOTHING_TO_RESUME
    assert "step-000001 skipped: MANIFEST.json is missing" in str(nothing.value)
    assert "step-000002 skipped: weights.safetensors differs from its manifest" in str(nothing.value)
    with pytest.raises(RunError):
        rotate(two, keep=1)
    assert names(two) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, b" " * (JSON_LIMIT + 1), b"\xff", b"null", b"[]", b"{}"),
        *(b'{"format":1}', b'{"format":2}', b'{"a":1e999}', b'{"format":1,"format":1}'),
    ],
)
def test_a_hostile_manifest_is_only_damage(two: Path, content: bytes):
    (two / "step-000002" / "MANIFEST.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"^MANIFEST\.json "):
        verify(two / "step-000002")
    assert found(two)[0].name == "step-000001"


@pytest.mark.parametrize("file", ["../step-000001/state.json", "/etc/passwd", "x.bin", "a/b.safetensors"])
def test_a_manifest_lists_nothing_outside_its_folder(two: Path, file: str):
    path = two / "step-000002" / "MANIFEST.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    manifest["files"][file] = {"size": 1, "sha256": ""}
    path.write_bytes(json_bytes(manifest | {"sha256": json_digest(manifest)}))
    with pytest.raises(DamagedError, match="lists a file that is none of a checkpoint's"):
        verify(two / "step-000002")
