"""A run's folder: what was asked (recipe, plan), what it ran on (manifest), what happened (metrics), what came of it.

runs/<name>/  recipe.yaml  plan.json  manifest.json  metrics.jsonl  checkpoints/  model/
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import records
from engine.plan import Plan

if TYPE_CHECKING:
    from engine.learner import Learner

VERSIONED = ("frostline", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors")


class RunFolder:
    """Where a run keeps its papers."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"

    def clear(self) -> None:
        """Forget an earlier run of this name."""
        for name in ("recipe.yaml", "plan.json", "manifest.json", "metrics.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.model, self.checkpoints):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)

    def open(self, recipe: Mapping[str, Any], plan: Plan, manifest: Mapping[str, Any]) -> None:
        """Write down what was asked and what it runs on."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.yaml").write_text(_yaml(recipe), encoding="utf-8")
        _write_json(self.path / "plan.json", plan.json())
        _write_json(self.path / "manifest.json", manifest)

    def record(self, event: records.Event, **more: Any) -> None:
        """Append an event to the run's records."""
        records.write(self.metrics, event, **more)

    def save_model(self, learner: Learner) -> Path:
        """Save the model and what prepares its inputs, to be loaded by plain `from_pretrained`."""
        if learner.accelerator.is_main_process:
            staged = self.path / ".model"
            shutil.rmtree(staged, ignore_errors=True)
            learner.model.save_pretrained(staged, safe_serialization=True)
            learner.processor.save_pretrained(staged)
            shutil.rmtree(self.model, ignore_errors=True)
            staged.rename(self.model)
        learner.accelerator.wait_for_everyone()
        return self.model


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


def _yaml(value: Mapping[str, Any]) -> str:
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    YAML(typ="safe", pure=True).dump(dict(value), text)
    return text.getvalue()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
