"""What the tests of checkpoints share: saving by step, checking what is there, failing at a call of the disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from engine import checkpoint
from engine.checkpoint import Checkpoint, newest
from engine.errors import RunError

CHANGES = {"write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir", "serialize_file"}
"""The C functions that change a disk, or wait for it; `serialize_file` is safetensors' own."""
READS = {"open", "read", "readinto", "stat", "lstat", "fstat", "listdir", "scandir"}


def tensors(step: int, size: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.full((size, size), float(step))
    return {"weights": {"layer.weight": weight}, "moments": {"layer.weight::exp_avg": weight / 2}}


def publish(folder: Path, step: int, size: int = 4, **state: Any) -> Path:
    return checkpoint.publish(folder, f"step-{step:06d}", tensors(step, size), {"step": step, **state})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def found(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint, after its tensors have been compared with those of its step, and what was skipped."""
    skipped: list[str] = []
    last = newest(folder, skipped)
    assert last is not None
    weight = last.read("weights")["layer.weight"]
    assert torch.equal(weight, torch.full_like(weight, float(last.state["step"])))
    return last, skipped


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except RunError as error:
            code = 100 + error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@contextmanager
def at_disk_call(number: int, functions: Set[str], act: Callable[[], None]) -> Iterator[list[str]]:
    """Act instead of the `number`-th call of such a C function, counted from 1; yields the names of those called."""
    calls: list[str] = []

    def watch(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in functions:
            calls.append(function.__name__)
            if len(calls) == number:
                act()

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)
