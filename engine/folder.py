"""A run's folder: what was asked (recipe, plan), what it ran on (manifest), what happened (metrics), what came of it.

runs/<name>/  recipe.yaml  plan.json  manifest.json  metrics.jsonl  confusion.json  report.html  checkpoints/  model/
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from engine import records
from engine.errors import REFUSED, RunError
from engine.plan import Plan

if TYPE_CHECKING:
    from engine.learner import Learner

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
        self.checkpoints = path / "checkpoints"

    def clear(self) -> None:
        """Forget an earlier run of this name."""
        for name in ("recipe.yaml", "plan.json", "manifest.json", "metrics.jsonl", "confusion.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.model, self.checkpoints):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)

    def finished(self) -> bool:
        """Whether the run of this folder is over and its model saved."""
        if not (self.metrics.exists() and self.model.is_dir()):
            return False
        return any(event["event"] == "finished" for event in records.read(self.metrics))

    def open(self, recipe: Mapping[str, Any], plan: Plan, processes: int, data: Mapping[str, str]) -> None:
        """Write down what was asked and what it runs on; `data` holds the fingerprint of each split."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(_yaml(recipe), encoding="utf-8")
        _write_json(self.path / "plan.json", plan.json())
        _write_json(self.manifest, manifest(recipe, plan, processes, data))

    def refuse_changes(self, recipe: Mapping[str, Any], data: Mapping[str, str], stage: int) -> None:
        """Raise `RunError` where a run would go on with another recipe or other data than it began with.

        What may change are keys that train nothing, and stages that have not begun: those after number `stage`.
        """
        changes = [line for key, line in differences(_read_yaml(self.recipe), dict(recipe)) if not _free(key, stage)]
        if json.loads(self.manifest.read_text(encoding="utf-8"))["data"] != dict(data):
            changes.append("the training rows are not those that the run began with")
        if changes:
            sentence = f"{self.path} was begun with another recipe; `--fresh` starts over, a name of its own keeps both"
            raise RunError("\n".join([sentence, *changes]), REFUSED)

    def cut_records(self, size: int) -> None:
        """Forget what was recorded after a checkpoint was taken: it happens again."""
        with self.metrics.open("r+b") as file:
            file.truncate(size)

    def record(self, event: records.Event, **more: Any) -> None:
        """Append an event to the run's records."""
        records.write(self.metrics, event, **more)

    def keep_confusion(
        self, split: str, stage: str, step: int, labels: Sequence[str], counts: Sequence[Sequence[int]]
    ) -> None:
        """Keep how often each label (row) was taken for each (column) on a split, in place of what was kept of it."""
        kept = json.loads(self.confusion.read_text(encoding="utf-8")) if self.confusion.exists() else {}
        kept[split] = {"stage": stage, "step": step, "labels": list(labels), "counts": counts}
        _write_json(self.confusion, kept)

    def save_model(self, learner: Learner) -> Path:
        """Save the model and what prepares its inputs, to be loaded by plain `from_pretrained`."""
        from engine.models import quietly

        if learner.accelerator.is_main_process:
            staged = self.path / ".model"
            shutil.rmtree(staged, ignore_errors=True)
            with quietly():
                learner.model.save_pretrained(staged, safe_serialization=True)
            learner.processor.save_pretrained(staged)
            learner.task.accompany(staged)
            shutil.rmtree(self.model, ignore_errors=True)
            staged.rename(self.model)
        learner.accelerator.wait_for_everyone()
        return self.model


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


def _free(key: str, stage: int) -> bool:
    later = re.match(r"stages\[(\d+)\]", key)
    return key in FREE or key.split(".")[0] == "cache" or (later is not None and int(later[1]) > stage)


def _read_yaml(path: Path) -> dict[str, Any]:
    return _plain_yaml().load(path.read_text(encoding="utf-8"))


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
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
