"""Files that survive a crash, and the lock of the one run that writes them.

Small steps that others build on: write and sync, stage under a hidden name, retire, read without following a link, and
JSON of which every byte counts. Nothing here knows what the files mean, and nothing here imports torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from engine.errors import ENVIRONMENT, LOCKED, RunError

JSON_LIMIT = 16 * 2**20
"""The most bytes a JSON file may have."""

_STAGING = ".staging-"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_held: set[int] = set()


class DamagedError(Exception):
    """Why something on the disk is not what was written, as the end of the sentence `step-000120 skipped: ...`."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone, and clear away what a killed one left half written.

    The kernel frees the lock with the process, however it ends. Raises `RunError`: `LOCKED` if another run holds it,
    `ENVIRONMENT` if the file system can't lock.
    """
    path = folder / "run.lock"
    try:
        make_folder(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        sentence = f"{path}: can't be opened ({reason(error)}); give another output folder"
        raise RunError(sentence, ENVIRONMENT) from error
    _held.add(descriptor)
    try:
        _claim(descriptor, path)
        drop_stale(folder)
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _claim(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = "".join(filter(str.isprintable, os.pread(descriptor, 200, 0).decode(errors="replace")))
        sentence = f"{path}: another run is writing here ({owner}); wait for it to end or give another output folder"
        raise RunError(sentence, LOCKED) from None
    except OSError as error:
        sentence = f"{path}: this file system can't lock ({reason(error)}); give an output folder on one that can"
        raise RunError(sentence, ENVIRONMENT) from error
    with suppress(OSError):  # on a full disk the lock holds all the same, without a name to it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _let_go() -> None:
    """A forked child drops its copy of the lock: a data worker that outlives a killed run would go on holding it."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each of them listed on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def stage(folder: Path) -> Path:
    """A new folder in `folder` under a hidden name, on the same file system, so that a rename is all it takes."""
    return Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))


def drop_stale(folder: Path) -> None:
    """Delete whatever a killed run left staged in `folder`; only for the one that holds its lock."""
    for path in folder.glob(f"{_STAGING}*"):
        drop(path)


def drop(staging: Path) -> None:
    """Best effort: what can't be deleted now has no name that counts, and the next run tries again."""
    shutil.rmtree(staging, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """Write a file that doesn't exist yet, and wait until it's on the disk."""
    with path.open("xb") as file:
        file.write(content)
    sync(path)


def replace(path: Path, content: bytes) -> None:
    """Write a file in one piece: a kill or a full disk leaves what was there before, whole."""
    staging = stage(path.parent)
    try:
        write(staging / path.name, content)
        os.replace(staging / path.name, path)
        sync(path.parent)
    finally:
        drop(staging)


def retire(path: Path) -> None:
    """Take a folder out of sight first and apart then: a kill in between leaves no half of it under its name."""
    grave = stage(path.parent)
    os.rename(path, grave / path.name)
    sync(path.parent)
    drop(grave)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, _READ)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its sha256; raises `DamagedError` if it can't be read."""
    with reading(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """An ordinary file, opened: no link to elsewhere, no pipe to wait on. Whatever fails is `DamagedError`."""
    try:
        with open(path, "rb", opener=lambda file, _: os.open(file, _READ)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise DamagedError(f"{path.name} is no ordinary file")
            yield stream
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        cause = "it is a symbolic link" if error.errno == errno.ELOOP else reason(error)
        raise DamagedError(f"{path.name} can't be read: {cause}") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file of at most `JSON_LIMIT` bytes; raises `DamagedError`."""
    with reading(path) as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise DamagedError(f"{path.name} has more than {JSON_LIMIT} bytes")
    with suppress(ValueError, RecursionError):
        return parse_json(content)
    raise DamagedError(f"{path.name} is no valid JSON")


def parse_json(content: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no key twice; raises `ValueError`, or `RecursionError` if it's nested too deep."""
    text = content.decode("utf-8")
    return json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON's")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(mapping := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


def json_bytes(value: Any) -> bytes:
    """A value as strict JSON without a blank: every byte means something, so that none can change unseen."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def json_digest(value: Any) -> str:
    """The sha256 of a value as JSON."""
    return hashlib.sha256(json_bytes(value)).hexdigest()


def reason(error: Exception) -> str:
    """Why the disk refused, on one line."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
