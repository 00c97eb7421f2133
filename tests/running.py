"""Whole runs for tests: a folder with a tiny saved model and real rows, and a recipe in it that is drafted or run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from engine import load, start
from engine.errors import ProblemsError, RunError
from engine.records import Event

FROZEN = ["@embeddings", "@blocks"]


def stage(name: str = "all", **keys: Any) -> dict[str, Any]:
    """A stage of four steps, unless it says otherwise."""
    length = {} if "epochs" in keys else {"steps": 4}
    return {"name": name, "learning_rate": 1e-2, **length, **keys}


def place(
    root: Path,
    model: nn.Module | None = None,
    train: Sequence[Mapping[str, Any]] | None = None,
    validation: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """`root` with `model`, a tiny BERT if left out, and `rows`: 48 reviews to train on and 16 to judge by."""
    reviews = tiny.reviews(64)
    tiny.save(model or tiny.bert(), root / "model")
    tiny.write_jsonl(root / "rows/train.jsonl", train or reviews[:48])
    tiny.write_jsonl(root / "rows/validation.jsonl", validation or reviews[48:])
    return root


def recipe(root: Path, **keys: Any) -> Path:
    """A recipe for what lies in `root`. It keeps nothing in a cache, so that tests look at the plain way."""
    plain = {"model": "model", "task": "text-classification", "data": "rows", "batch_size": 8, "cache": "off"}
    path = root / "recipe.yaml"
    path.write_text(json.dumps({**plain, "stages": [stage()], **keys}, indent=1))  # JSON is YAML
    return path


def draft(root: Path, **keys: Any) -> start.Draft:
    """The plan of a recipe and what it was made from."""
    return start.draft(load.load(recipe(root, **keys)), root)


def run(root: Path, **keys: Any) -> list[Event]:
    """The events of a whole run; its folder is `root/runs/recipe`."""
    return list(start.run(load.load(recipe(root, **keys)), "recipe", root, root / "runs", fresh=True))


def events(happened: Sequence[Event], kind: type) -> list[Any]:
    """The events of one kind."""
    return [event for event in happened if isinstance(event, kind)]


def refused(root: Path, **keys: Any) -> tuple[tuple[str | int, ...], str]:
    """Key and sentence of the one problem for which both a draft and a run of a recipe are refused."""
    problems = []
    for act in (draft, run):
        with pytest.raises(ProblemsError) as caught:
            act(root, **keys)
        assert caught.value.exit_code == 2
        problems.append(caught.value.problems)
    assert problems[0] == problems[1]
    assert len(problems[0]) == 1, problems[0]
    assert "\n" not in problems[0][0].sentence
    return problems[0][0].key, problems[0][0].sentence


def stopped(root: Path, **keys: Any) -> tuple[str, int, list[Event]]:
    """Sentence and exit code that stop a run, and what happened before."""
    happened: list[Event] = []
    loaded = load.load(recipe(root, **keys))
    with pytest.raises(RunError) as caught:
        happened.extend(start.run(loaded, "recipe", root, root / "runs", fresh=True))
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.exit_code, happened
