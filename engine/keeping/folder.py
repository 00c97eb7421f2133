"""A run's folder: what was asked (recipe, plan), what it ran on (manifest), what happened (metrics), what came of it.

runs/<name>/  recipe.yaml  plan.json  manifest.json  metrics.jsonl  confusion.json  report.html
              checkpoints/  model/  adapter/  export/  frostline/ (TensorBoard's files)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ruamel.yaml import YAML, YAMLError
from safetensors import SafetensorError

from engine import records
from engine.errors import ENVIRONMENT, REFUSED, RunError
from engine.keeping import durable
from engine.plan import Plan
from engine.tracking import PROJECT

if TYPE_CHECKING:
    from engine.learner import Learner

T = TypeVar("T")

VERSIONED = ("frostline", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors")


FREE = ("training.logging_steps", "training.save_steps", "training.save_total_limit", "evaluation.batch_size")
"""Keys that may change between a run and its continuation: they don't decide what is trained."""


class RunFolder:
    """Where a run keeps its papers."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.metrics = path / "metrics.jsonl"
        self.confusion = path / "confusion.json"
        self.report = path / "report.html"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.exports = path / "export"
        self.tracked = path / PROJECT

    def clear(self) -> None:
        """Forget an earlier run of this name: its checkpoints at once, so that no kill leaves some to go on from."""
        with self._writing():
            for folder in (self.checkpoints, self.model, self.adapter, self.exports, self.tracked):
                if folder.is_dir() and not folder.is_symlink():
                    durable.retire(folder)
            for name in ("recipe.yaml", "plan.json", "manifest.json", "metrics.jsonl", "confusion.json", "report.html"):
                (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses, in one sentence."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            there = f"{self.path}: can't be written ({durable.reason(error)})"
            raise RunError(f"{there}; make room, and the same command goes on", ENVIRONMENT) from error

    def finished(self, recipe: Mapping[str, Any]) -> bool:
        """Whether the run of this folder is over and its model saved; raises `RunError` if another recipe asked for it.

        Another recipe under the same name is another model: to say that it is there already would be a lie.
        """
        if not (self.metrics.exists() and self.model.is_dir()):
            return False
        if not any(event["event"] == "finished" for event in records.read(self.metrics)):
            return False
        self.refuse_changes(recipe, {}, sys.maxsize)
        return True

    def open(self, recipe: Mapping[str, Any], plan: Plan, processes: int, prints: Mapping[str, str]) -> None:
        """Write down what was asked and what it runs on; `prints` holds the fingerprint of each split and the model."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            durable.replace(self.recipe, _yaml(recipe).encode())
            _write_json(self.path / "plan.json", plan.json())
            _write_json(self.manifest, manifest(recipe, plan, processes, prints))

    def refuse_changes(self, recipe: Mapping[str, Any], prints: Mapping[str, str], begun: int) -> None:
        """Raise `RunError` where a run would go on with another recipe, other data or another model than it began with.

        What may change are keys that train nothing, and all stages but the first `begun`.
        """
        try:
            old = _plain_yaml().load(self.recipe.read_text(encoding="utf-8"))
            had = json.loads(self.manifest.read_text(encoding="utf-8"))["data"]
        except (OSError, ValueError, KeyError, YAMLError) as error:
            what = f"{self.path}: what the run was asked can't be read ({durable.reason(error)})"
            raise RunError(f"{what}; restore its papers, or start over with `--fresh`", ENVIRONMENT) from error
        changes = [line for key, line in differences(old, dict(recipe)) if not _free(key, begun)]
        changes += [f"  {name}: not the same as when the run began" for name in prints if had.get(name) != prints[name]]
        if changes:
            sentence = f"{self.path} was begun otherwise; `--fresh` starts over, a name of its own keeps both"
            raise RunError("\n".join([sentence, *changes]), REFUSED)

    def recorded(self) -> int:
        """Bytes of the records so far, all of them on the disk."""
        if not self.metrics.exists():
            return 0
        with self._writing():
            durable.sync(self.metrics)
            return self.metrics.stat().st_size

    def cut_records(self, size: int) -> str:
        """Forget what was recorded after a checkpoint was taken: it happens again. Returns what is missing, if any."""
        with self._writing(), self.metrics.open("a+b") as file:
            had = file.seek(0, os.SEEK_END)
            if had >= size:
                file.truncate(size)
                return ""
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            return f"{self.metrics.name} has lost {size - had} bytes of what was recorded before"

    def record(self, event: records.Event, **more: Any) -> None:
        """Append an event to the run's records."""
        with self._writing():
            records.write(self.metrics, event, **more)

    def keep_confusion(
        self, split: str, stage: str, step: int, labels: Sequence[str], counts: Sequence[Sequence[int]]
    ) -> None:
        """Keep how often each label (row) was taken for each (column) on a split, in place of what was kept of it."""
        with self._writing():
            kept = json.loads(self.confusion.read_text(encoding="utf-8")) if self.confusion.exists() else {}
            kept[split] = {"stage": stage, "step": step, "labels": list(labels), "counts": counts}
            _write_json(self.confusion, kept)

    def save_model(self, learner: Learner, proved: Callable[[Path], T]) -> T:
        """Save the model and what prepares its inputs, to be loaded by plain `from_pretrained`. Main process only.

        It gets its name once `proved` has seen the files and every byte of them is on the disk.
        """
        from engine.models import quietly

        def write(staged: Path) -> T:
            with quietly():
                learner.model.save_pretrained(staged, safe_serialization=True)
            learner.processor.save_pretrained(staged)
            learner.task.accompany(staged)
            return proved(staged)

        return self._placed(self.model, write)

    def save_apart(self, write: Callable[[Path], None]) -> None:
        """Save what `write` puts into a folder as the run's adapters. Main process only."""
        self._placed(self.adapter, write)

    def _placed(self, target: Path, write: Callable[[Path], T]) -> T:
        with self._writing():
            return placed(target, write)


def placed(target: Path, write: Callable[[Path], T]) -> T:
    """Give a folder its name once `write` has filled it and every byte of it is on the disk; what bore it goes."""
    staging = durable.stage(target.parent)
    staged = staging / target.name
    try:
        staged.mkdir()
        written = write(staged)
        for path in (*staged.rglob("*"), staged):
            durable.sync(path)
        if target.exists():
            durable.retire(target)
        staged.rename(target)
        durable.sync(target.parent)
    finally:
        durable.drop(staging)
    return written


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each key at which two recipes differ, with a line that says how."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys((*old, *new)):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif _listed(old) and _listed(new):
        for index in range(max(len(old), len(new))):
            pair = (part[index] if index < len(part) else None for part in (old, new))
            yield from differences(*pair, f"{key}[{index}]")
    elif old != new:
        yield key, f"  {key}: {old!r} -> {new!r}"


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _free(key: str, begun: int) -> bool:
    later = re.match(r"stages\[(\d+)\]", key)
    return key in FREE or key.split(".")[0] == "cache" or (later is not None and int(later[1]) >= begun)


def manifest(recipe: Mapping[str, Any], plan: Plan, processes: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a run depends on besides its recipe: versions, code, data, seed, machine."""
    return {
        "format": 1,
        "recipe": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "plan": plan.fingerprint,
        "seed": plan.seed,
        "processes": processes,
        "data": dict(data),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONED}},
        "commit": _commit(),
        "machine": {"system": platform.system(), "processor": platform.machine()},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the folder that the run was started from, with `+` for changes on top of it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _plain_yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _yaml(value: Mapping[str, Any]) -> str:
    text = StringIO()
    _plain_yaml().dump(json.loads(json.dumps(value)), text)
    return text.getvalue()


def _write_json(path: Path, value: Any) -> None:
    durable.replace(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
