"""An ONNX file in int8, a quarter of the size or so, and what that costs: its metrics beside those of the file before.

Weights become int8 once, activations as they come (`onnxruntime.quantization`, dynamic). Both files answer every row of
a split; which of them is good enough is for the reader to say.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from engine.errors import REFUSED, RunError
from engine.recipe import Recipe
from engine.rows.split import Split
from engine.shipping import elsewhere, graphs
from engine.tasks import Facts, Task

FILE = "model.int8.onnx"
AT_ONCE = 8
"""Rows that are answered together."""


def refuse(task: Task) -> None:
    """Raise `RunError` for a task whose metrics one forward pass can't give: int8 without its price is not offered."""
    if task.writes or task.refers:
        why = "what the model writes" if task.writes else "the model as it was before it trained"
        kind: str = task.type  # pyright: ignore[reportAttributeAccessIssue]
        raise RunError(f"`--int8` is judged on your rows, and {kind} is judged by {why}; leave the option out", REFUSED)


def write(file: Path) -> Path:
    """Write the int8 form of an ONNX file beside it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.level
    with contextlib.ExitStack() as silent:
        silent.callback(logging.root.setLevel, level)
        silent.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.root.setLevel(logging.ERROR)  # it recommends to prepare the file, which the tracer has done
        quantize_dynamic(file, file.parent / FILE, weight_type=QuantType.QInt8)
    return file.parent / FILE


class _Runner:
    """An ONNX file where a task expects a model."""

    def __init__(self, file: Path, task: Task, model: nn.Module, members: int):
        self.answer, self.task, self.model, self.members = elsewhere.onnx(file), task, model, members

    def __call__(self, **inputs: Any) -> ModelOutput:
        taken = graphs.arranged(self.task, self.model, inputs, self.members)
        outputs = self.answer({name: value.numpy() for name, value in taken.items()})
        return ModelOutput({name: torch.from_numpy(value) for name, value in outputs.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)  # what a task asks a model about itself, such as its frames of a recording


def score(file: Path, recipe: Recipe, model: nn.Module, split: Split, collate: Any, facts: Facts) -> dict[str, float]:
    """The recipe's metrics of an ONNX file's answers on every row of a split; `model` says what it is an export of."""
    task, runner = recipe.task, _Runner(file, recipe.task, model, facts.members)
    order = np.arange(len(split)) if split.lengths is None else np.argsort(split.lengths, kind="stable")
    rows: list[tuple[int, Any, Any]] = []
    for start in range(0, len(split), AT_ONCE):
        indices = order[start : start + AT_ONCE].tolist()
        batch = collate(split.examples(indices))
        rows += zip(indices, *task.answers(task.forward(runner, batch), batch), strict=True)
    rows.sort(key=lambda row: row[0])
    return task.score([row[1] for row in rows], [row[2] for row in rows], metrics(recipe, facts), facts)


def metrics(recipe: Recipe, facts: Facts) -> list[str]:
    """The metrics that the recipe names, else those of the task."""
    named = [recipe.evaluation.metric, *recipe.evaluation.metrics]
    named = [name for name in named if name and name != "loss"]
    return list(dict.fromkeys(named or recipe.task.default_metrics(facts)))
