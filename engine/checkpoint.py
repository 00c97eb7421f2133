"""What survives a crash: a folder of checkpoints, each of them whole or not there at all.

A checkpoint is groups of named tensors and a plain JSON state. It is written under a hidden name, synced, listed with
its sizes and hashes, and only then renamed to the name that a reader looks for:

    checkpoints/step-000120/  weights.safetensors  moments.safetensors  state.json  MANIFEST.json

Nothing here knows a recipe, a plan or other processes: one process, which holds the lock, calls it and the others wait.
It never unpickles, never follows a symbolic link inside the folder, and never overwrites an intact checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ENVIRONMENT, GUARD, NOTHING_TO_RESUME, RunError
from engine.keeping import durable
from engine.keeping.durable import JSON_LIMIT, DamagedError, lock

__all__ = ["Checkpoint", "DamagedError", "clear", "is_kept", "lock", "newest", "publish", "rotate", "verify"]

FORMAT = 1
"""The version of the layout; a checkpoint of any other is skipped, not guessed at."""
MANIFEST, STATE = "MANIFEST.json", "state.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FILE = re.compile(r"[a-z][a-z0-9_]{0,99}\.safetensors|state\.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that `verify` or `newest` found whole."""

    path: Path
    """The folder it lies in."""
    state: Mapping[str, Any]
    """The JSON state it was published with; `step` is always in it."""
    files: Mapping[str, Mapping[str, Any]]
    """Size in bytes and sha256 of each of its files."""
    serial: int
    """How many checkpoints its folder had been given before it: of two at the same step, the higher one is newer."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of its groups of tensors, sorted."""
        return tuple(sorted(file.removesuffix(".safetensors") for file in self.files if file != STATE))

    def read(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, by name, on the CPU and in memory of their own.

        Raises `KeyError` for a group it doesn't have, `RunError` if the disk fails since it was verified.
        """
        if group not in self.groups:
            raise KeyError(f"{self.name} holds no `{group}`, only {', '.join(self.groups)}")
        path = self.path / f"{group}.safetensors"
        try:
            # Cloned, because load_file maps the file: rotating this checkpoint away must not touch the tensors.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            cause = durable.reason(error)
            raise RunError(f"{path}: was intact and can't be read now ({cause}); mend the disk", ENVIRONMENT) from error

    @property
    def _age(self) -> tuple[int, int]:
        return self.state["step"], self.serial


def publish(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint that is seen under `name` only once all of it is on the disk, and return its path.

    `tensors` is group -> name -> tensor, any shape, dtype and device; tensors that share memory are written once each.
    `state` is plain JSON without NaN and has a whole number `step`; `"kept": true` in it protects from `rotate`.
    A damaged checkpoint of that name is replaced.

    Raises `ValueError` for a name or a state that can't be written; `RunError` with `ENVIRONMENT` if the disk refuses,
    with `GUARD` if an intact checkpoint has that name. Earlier checkpoints stand in any case.
    """
    target, content = folder / _checked(name, tensors), _state_content(state)
    try:
        durable.make_folder(folder)
        durable.drop_stale(folder)
        _make_room(target)
        staging = durable.stage(folder)
        try:
            _fill(staging, tensors, content, serial=_next_serial(folder))
            os.rename(staging, target)
            durable.sync(folder)
        finally:
            durable.drop(staging)
    except (OSError, SafetensorError, DamagedError) as error:
        needed = len(content) + sum(each.nbytes for named in tensors.values() for each in named.values())
        raise RunError(_unwritten(target, error, needed), ENVIRONMENT) from error
    return target


def _fill(staging: Path, tensors: Mapping[str, Mapping[str, Tensor]], content: bytes, serial: int) -> None:
    """Everything of a checkpoint but its name. The manifest comes last, so it never lists what isn't on the disk."""
    for group, named in tensors.items():
        path = staging / f"{group}.safetensors"
        save_file(_storable(named), path)
        durable.sync(path)
    durable.write(staging / STATE, content)
    files = {path.name: durable.fingerprint(path) for path in sorted(staging.iterdir())}
    manifest = {"format": FORMAT, "serial": serial, "files": files}
    durable.write(staging / MANIFEST, durable.json_bytes(manifest | {"sha256": durable.json_digest(manifest)}))
    durable.sync(staging)


def _storable(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: on the CPU, dense, and no two in the same memory."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        storable[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return storable


def _checked(name: str, tensors: Mapping[str, Any]) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a checkpoint: letters, digits, dots, dashes and underscores only")
    for group in tensors:
        if not _FILE.fullmatch(f"{group}.safetensors"):
            raise ValueError(f"{group!r} is no name for a group: lower-case letters, digits and underscores only")
    return name


def _state_content(state: Mapping[str, Any]) -> bytes:
    """The state as bytes, if reading them gives the same state: JSON would turn a number that is a key into text."""
    rule = f"a state is plain JSON with a whole number `step`, of at most {JSON_LIMIT} bytes"
    try:
        content = durable.json_bytes(dict(state))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{rule}: {error}") from error
    if durable.parse_json(content) != state or not _has_step(state) or len(content) > JSON_LIMIT:
        raise ValueError(rule)
    return content


def _make_room(target: Path) -> None:
    if not os.path.lexists(target):
        return
    try:
        verify(target)
    except DamagedError:
        durable.retire(target)
    else:
        raise RunError(f"{target}: is there already and intact; resume from it or give another output folder", GUARD)


def _unwritten(target: Path, error: Exception, needed: int) -> str:
    there = next(folder for folder in target.absolute().parents if folder.exists())
    return (
        f"{target}: the checkpoint could not be written ({durable.reason(error)}): it needs {needed:,} bytes and "
        f"{shutil.disk_usage(there).free:,} are free; earlier ones are untouched; make room and resume"
    )


def verify(path: Path) -> Checkpoint:
    """The checkpoint at `path`, once every byte of it has been read; raises `DamagedError` if it isn't whole."""
    checkpoint = _glance(path)
    for file, listed in checkpoint.files.items():
        if durable.fingerprint(path / file) != listed:
            raise DamagedError(f"{file} differs from its manifest")
    return checkpoint


def newest(folder: Path, skipped: list[str] | None = None) -> Checkpoint | None:
    """The checkpoint with the highest step that verifies, or None if `folder` holds none at all.

    `folder` holds checkpoints, the lock and nothing else. Each one passed over is added to `skipped` in a sentence.
    Raises `RunError` with `NOTHING_TO_RESUME` if there are some and none verifies: starting over has to be asked for.
    """
    passed: list[str] = []
    for candidate in _readable(folder, passed):
        if whole := _attempt(verify, candidate.path, passed):
            break
    else:
        whole = None
    if skipped is not None:
        skipped.extend(passed)
    if passed and not whole:
        sentence = f"{folder}: no checkpoint is intact, so there is nothing to resume; start afresh or restore one"
        raise RunError("\n".join([sentence, *passed]), NOTHING_TO_RESUME)
    return whole


def _readable(folder: Path, skipped: list[str]) -> list[Checkpoint]:
    """The checkpoints whose state is intact and whose files have the right sizes, newest first."""
    found = [checkpoint for path in _found(folder) if (checkpoint := _attempt(_glance, path, skipped))]
    return sorted(found, key=lambda checkpoint: checkpoint._age, reverse=True)


def _found(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        return [path for path in paths if not path.name.startswith(".") and (path.is_symlink() or path.is_dir())]
    except OSError as error:
        raise RunError(f"{folder}: can't be listed ({durable.reason(error)}); mend the disk", ENVIRONMENT) from error


def _next_serial(folder: Path) -> int:
    return 1 + max((checkpoint.serial for checkpoint in _readable(folder, [])), default=0)


def _attempt(check: Callable[[Path], Checkpoint], path: Path, skipped: list[str]) -> Checkpoint | None:
    try:
        return check(path)
    except (DamagedError, OSError) as error:
        name = path.name if _NAME.fullmatch(path.name) else ascii(path.name)
        skipped.append(f"{name} skipped: {durable.reason(error)}")
        return None


def _glance(path: Path) -> Checkpoint:
    """What can be known of a checkpoint without reading its tensors; raises `DamagedError`."""
    if path.is_symlink():
        raise DamagedError("it is a symbolic link")
    files, serial = _manifest(path / MANIFEST)
    for file, listed in files.items():
        with durable.reading(path / file) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size != listed.get("size"):
            raise DamagedError(f"{file} has {size} bytes, which differs from its manifest")
    if durable.fingerprint(path / STATE) != files[STATE]:
        raise DamagedError(f"{STATE} differs from its manifest")
    state = durable.read_json(path / STATE)
    if not isinstance(state, dict) or not _has_step(state):
        raise DamagedError(f"{STATE} names no step")
    return Checkpoint(path, state, files, serial)


def _manifest(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    manifest = durable.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{path.name} is of another format than {FORMAT}, the one this version reads")
    if manifest.pop("sha256", None) != durable.json_digest(manifest):
        raise DamagedError(f"{path.name} differs from its own sha256")
    files, serial = manifest.get("files"), manifest.get("serial")
    if not isinstance(files, dict) or STATE not in files or not isinstance(serial, int):
        raise DamagedError(f"{path.name} is incomplete")
    for file, listed in files.items():
        if not _FILE.fullmatch(file) or not isinstance(listed, dict):
            raise DamagedError(f"{path.name} lists a file that is none of a checkpoint's")
    return files, serial


def is_kept(state: Mapping[str, Any]) -> bool:
    """Whether a state asks to be kept: the best one, the end of a stage."""
    return state.get("kept") is True


def rotate(folder: Path, keep: int, protected: Callable[[Mapping[str, Any]], bool] = is_kept) -> list[str]:
    """Delete all but the `keep` newest checkpoints and those whose state is `protected`; returns the deleted names.

    Called after `publish`. It deletes nothing before the newest one has been verified, never that one, never one newer
    than that, and none it can't read. Raises `RunError` if none verifies or the disk refuses.
    """
    if keep < 1:
        raise ValueError("at least one checkpoint must be kept")
    last = newest(folder)
    if last is None:
        return []
    ordinary = [each for each in _readable(folder, []) if each._age <= last._age and not protected(each.state)]
    for old in reversed(ordinary[keep:]):
        _remove(old.path)
    return [old.name for old in ordinary[keep:]]


def clear(folder: Path) -> None:
    """Remove every checkpoint: a run that starts afresh must not rotate its own away for those of an older one."""
    for path in _found(folder):
        _remove(path)


def _remove(path: Path) -> None:
    try:
        durable.retire(path)
    except OSError as error:
        raise RunError(f"{path}: can't be deleted ({durable.reason(error)}); delete it by hand", ENVIRONMENT) from error


def _has_step(state: Mapping[str, Any]) -> bool:
    return type(state.get("step")) is int and state["step"] >= 0
