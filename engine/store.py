"""Activations on disk: one row per example and cut, of any length, written once under the name of their content.

    <folder>/<name>/  header.json  cut0.rows  cut0.index  cut0.scales  cut1.rows ...

A store appears whole or not at all: it is written under a hidden name, synced, sealed with its sizes and hashes, and
renamed. Whatever isn't exactly what was written is missing, never wrong. Rows are read through a memory map; nothing is
pickled, and a store knows no model.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from engine.errors import ENVIRONMENT, RunError
from engine.keeping import durable
from engine.keeping.durable import DamagedError

FORMAT = 1
"""The version of the layout; a store of any other is missing."""
FOLDER = ".cache"
"""Its name among the folders of runs."""
HEADER, CLAIM = "header.json", "claim"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
Dtype = Literal["float32", "float16", "bfloat16", "int8"]


class TooLargeError(ValueError):
    """A value that the store's dtype can't hold."""


class _Sealed:
    """A file that hashes what it is given on the way to the disk."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("xb")
        self.sha = hashlib.sha256()
        self.size = 0

    def write(self, values: Tensor) -> None:
        content = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.file.write(content)
        self.sha.update(content)
        self.size += len(content)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"size": self.size, "sha256": self.sha.hexdigest()}


class _Column:
    """The rows of one cut while they are written."""

    def __init__(self, folder: Path, place: int, count: int, dtype: Dtype):
        self.dtype = dtype
        self.rows = _Sealed(folder / f"cut{place}.rows")
        self.scales = _Sealed(folder / f"cut{place}.scales")
        self.path = folder / f"cut{place}.index"
        self.index: list[list[int] | None] = [None] * count
        self.end = self.scales_end = 0

    def put(self, index: int, row: Tensor) -> None:
        if self.index[index] is not None:
            raise ValueError(f"row {index} was written before")
        self.index[index] = [self.end, self.scales_end, *row.shape]
        if self.dtype == "int8":
            row, scales = quantised(row)
            self.scales.write(scales)
            self.scales_end += scales.numel()
        else:
            row = narrowed(row, DTYPES[self.dtype])
        self.rows.write(row)
        self.end += row.numel()

    def close(self) -> list[tuple[str, dict[str, Any]]]:
        if None in self.index:
            raise ValueError(f"row {self.index.index(None)} was never written")
        index = _Sealed(self.path)
        index.write(torch.tensor(self.index, dtype=torch.int64))
        return [(file.path.name, file.close()) for file in (self.rows, self.scales, index)]


def narrowed(row: Tensor, dtype: torch.dtype) -> Tensor:
    """A row in the store's dtype; raises `TooLargeError` where float16 would make it infinite."""
    small = row.to(dtype)
    if dtype == torch.float16 and row.dtype != dtype and not bool(torch.isfinite(small).all()):
        raise TooLargeError("a value is beyond the range of float16")
    return small


def quantised(row: Tensor) -> tuple[Tensor, Tensor]:
    """A row as int8 and one float32 scale for each of its last-axis vectors: off by at most 1/254 of the largest."""
    row = row.float()
    scales = row.abs().amax(-1, keepdim=True) / 127
    if not bool(torch.isfinite(scales).all()):
        raise TooLargeError("a value is not finite")
    return (row / scales.clamp_min(1e-30)).round().to(torch.int8), scales


class Writer:
    """A store in the making: inside `with`, `put` every row once and `publish`; otherwise nothing is left of it."""

    def __init__(
        self, folder: Path, name: str, cuts: Sequence[str], count: int, dtype: Dtype = "float32", about: str = ""
    ):
        """`about` is for people alone: whose activations these are."""
        own(folder)
        self.about = about
        self.folder, self.name, self.cuts, self.count, self.dtype = folder, name, tuple(cuts), count, dtype
        self.staging = durable.stage(folder)
        self.claim = _claimed(self.staging)
        self.columns = [_Column(self.staging, place, count, dtype) for place in range(len(self.cuts))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.claim)
        for column in self.columns:
            with suppress(OSError):  # what a full disk didn't take is dropped anyway
                column.rows.file.close()
                column.scales.file.close()
        durable.drop(self.staging)

    def put(self, index: int, rows: Sequence[Tensor]) -> None:
        """The row of example `index` at each cut, without a batch axis."""
        for column, row in zip(self.columns, rows, strict=True):
            column.put(index, row)

    def publish(self) -> Store:
        """Seal it, give it its name and open it; if another writer was first, theirs is as good."""
        files = dict(file for column in self.columns for file in column.close())
        facts = {"format": FORMAT, "name": self.name, "dtype": self.dtype, "count": self.count, "cuts": self.cuts}
        header = facts | {"about": self.about, "files": files}
        sealed = durable.json_bytes(header | {"seal": durable.json_digest(header)})
        durable.write(self.staging / HEADER, sealed)
        (self.staging / CLAIM).unlink()
        durable.sync(self.staging)
        for _ in range(3):
            with suppress(OSError):  # the name is taken, or it has been given before
                os.rename(self.staging, self.folder / self.name)
                durable.sync(self.folder)
            if store := Store.open(self.folder, self.name):
                return store  # a damaged one has been taken away, and the name is free
        lost = f"{self.folder}: what was just written there is gone or can't be read back"
        raise RunError(f"{lost}; if nobody has cleared the cache meanwhile, mend the disk", ENVIRONMENT)


class Store:
    """The rows of a finished store."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.name: str = header["name"]
        self.count: int = header["count"]
        self.dtype: Dtype = header["dtype"]
        self.cuts: tuple[str, ...] = tuple(header["cuts"])
        self.size = sum(file["size"] for file in header["files"].values())
        self._columns = [self._map(header["files"], f"cut{place}") for place in range(len(self.cuts))]
        self._tables = [self._table(columns) for columns in self._columns]

    @classmethod
    def open(cls, folder: Path, name: str) -> Store | None:
        """The store of that name, every byte of it checked, or None: one that is damaged is taken away."""
        path = folder / name
        try:
            seen = _which(path)
        except OSError:
            return None  # a writer may be about to give it its name: there is nothing to take away
        try:
            header = _header(path, name)
            for file, expected in header["files"].items():
                if durable.fingerprint(path / file) != expected:
                    raise DamagedError(f"{file} differs from its header")
            store = cls(path, header)
            os.utime(path / HEADER)  # last used
        except (DamagedError, OSError, RuntimeError, ValueError, KeyError, TypeError):
            _take_away(path, seen)
            return None
        return store

    def _map(self, files: dict[str, Any], stem: str) -> tuple[np.ndarray, Tensor, Tensor]:
        index = np.fromfile(self.path / f"{stem}.index", dtype=np.int64).reshape(self.count, -1)
        rows = _mapped(self.path / f"{stem}.rows", files[f"{stem}.rows"]["size"], DTYPES[self.dtype])
        return index, rows, _mapped(self.path / f"{stem}.scales", files[f"{stem}.scales"]["size"], torch.float32)

    def _table(self, columns: tuple[np.ndarray, Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        """All rows in the order they were written in, and each example's place there; None where shapes differ."""
        index, rows, _ = columns
        if self.dtype == "int8" or not self.count or not (index[:, 2:] == index[0, 2:]).all():
            return None
        shape = index[0, 2:].tolist()
        return rows.view(self.count, *shape), torch.from_numpy(index[:, 0] // max(1, math.prod(shape)))

    def rows(self, cut: int, indices: Sequence[int]) -> Tensor | list[Tensor]:
        """What some examples have at a cut: one tensor, batch first, where all rows of the cut have the same shape."""
        if (table := self._tables[cut]) is None:
            return [self.row(cut, index) for index in indices]
        rows, places = table
        return rows[places[torch.as_tensor(indices)]]

    def row(self, cut: int, index: int) -> Tensor:
        """What example `index` has at a cut, without a batch axis; a view of the file, unless it's int8."""
        places, rows, scales = self._columns[cut]
        start, scales_start, *shape = places[index].tolist()
        row = rows[start : start + math.prod(shape)].view(shape)
        if self.dtype != "int8":
            return row
        vectors = [*shape[:-1], 1]
        return row.float() * scales[scales_start : scales_start + math.prod(vectors)].view(vectors)


def _header(path: Path, name: str) -> dict[str, Any]:
    header = durable.read_json(path / HEADER)
    if not isinstance(header, dict) or header.pop("seal", None) != durable.json_digest(header):
        raise DamagedError(f"{HEADER} is not as it was written")
    if header["format"] != FORMAT or header["name"] != name:
        raise DamagedError(f"{HEADER} belongs to another store")
    return header


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size // dtype.itemsize, dtype=dtype)


def padded(rows: Sequence[Tensor], width: int = 0, left: bool = False) -> Tensor:
    """Rows of different lengths as one batch, at least `width` long, zeros where a row is shorter; a copy in memory."""
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    shape[:1] = [max(width, *shape[:1])]
    if all(list(row.shape) == shape for row in rows):
        return torch.stack(list(rows))
    batch = rows[0].new_zeros(len(rows), *shape)
    for place, row in zip(batch, rows, strict=True):
        spans = zip(row.shape, shape, strict=True)
        place[tuple(slice(most - size, most) if left else slice(size) for size, most in spans)] = row
    return batch


def own(folder: Path) -> None:
    """Make the folder of all stores, for this user alone: who can write there could change what a model learns."""
    try:
        durable.make_folder(folder)
        if folder.is_symlink():
            raise RunError(f"{folder}: the cache is a link to elsewhere; give another folder", ENVIRONMENT)
        if folder.stat().st_uid != os.getuid():
            raise RunError(f"{folder}: the cache belongs to another user; give another folder", ENVIRONMENT)
        folder.chmod(0o700)
    except OSError as error:
        sentence = f"{folder}: the cache can't be made ({durable.reason(error)}); give another folder"
        raise RunError(sentence, ENVIRONMENT) from error
    _sweep(folder)


def _claimed(staging: Path) -> int:
    """Claim a folder for as long as the file that is returned stays open; nobody sees the claim before it is held."""
    unseen = staging / f"new-{CLAIM}"
    claim = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(claim, fcntl.LOCK_EX)
    os.rename(unseen, staging / CLAIM)
    return claim


def _sweep(folder: Path) -> None:
    """Drop what killed writers left: a claim that nobody holds, or an hour without one."""
    for staging in folder.glob(".staging-*"):
        with suppress(OSError):
            if not (staging / CLAIM).exists():
                if time.time() - staging.stat().st_mtime > 3600:
                    durable.drop(staging)
                continue
            claim = os.open(staging / CLAIM, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                durable.drop(staging)
            finally:
                os.close(claim)


@dataclass(frozen=True)
class Kept:
    """What one frozen prefix takes on the disk, all its shards together."""

    about: str
    """Whose activations they are, as far as that was written down."""
    cuts: tuple[str, ...]
    """The modules whose output was kept."""
    rows: int
    dtype: str
    size: int
    """Bytes."""
    used: float
    """When it was last opened, in seconds since 1970."""


def listed(folder: Path) -> list[Kept]:
    """The finished stores of a folder, those used last first. Headers are checked, rows are not read."""
    shards: dict[str, list[Kept]] = {}
    for path in _finished(folder):
        with suppress(DamagedError, OSError, ValueError, KeyError, TypeError):  # it is missing, as `open` would say
            header = _header(path, path.name)
            size = sum(file["size"] for file in header["files"].values())
            facts = header.get("about", ""), tuple(header["cuts"]), header["count"], header["dtype"]
            shards.setdefault(re.sub(r"-\d+-of-\d+$", "", path.name), []).append(Kept(*facts, size, _last_used(path)))
    whole = [
        replace(
            parts[0],
            rows=sum(part.rows for part in parts),
            size=sum(part.size for part in parts),
            used=max(part.used for part in parts),
        )
        for parts in shards.values()
    ]
    return sorted(whole, key=lambda kept: -kept.used)


def usage(folder: Path) -> int:
    """Bytes that all stores of a folder take, those being written included."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process may be clearing
            total += path.lstat().st_size if path.is_file() else 0
    return total


def clear(folder: Path) -> int:
    """Take all finished stores away; the bytes that were freed. Runs that read them go on reading."""
    return sum(_take_away(path) for path in _finished(folder))


def evict(folder: Path, budget: int, keep: Collection[str] = ()) -> list[str]:
    """Take the longest unused stores away until the folder takes at most `budget` bytes; the names taken.

    Those named in `keep` stay, whatever it costs.
    """
    taken = []
    for path in sorted(_finished(folder), key=_last_used):
        if usage(folder) <= budget:
            break
        if path.name not in keep:
            _take_away(path)
            taken.append(path.name)
    return taken


def _finished(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"[!.]*/{HEADER}")]


def _last_used(path: Path) -> float:
    with suppress(OSError):
        return (path / HEADER).stat().st_mtime
    return 0.0


def _which(path: Path) -> tuple[int, int]:
    """What tells a folder from another that has had its name; the time as well, for inodes are given again."""
    found = path.lstat()
    return found.st_ino, found.st_ctime_ns


def _take_away(path: Path, seen: tuple[int, int] | None = None) -> int:
    """Take a store away, or only the very one that was `seen`: another may have its name by now."""
    size = usage(path)
    with suppress(OSError):  # another process was first
        if seen in (None, _which(path)):
            durable.retire(path)
            return size
    return 0
