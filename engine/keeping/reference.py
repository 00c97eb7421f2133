"""What a model makes of every row before anything has trained: asked once, kept as a column of the encoded rows.

It trains nothing, and it asks the model in eval mode, so the answer is the same on any number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from engine import freezing
from engine.data import Encoded, Split
from engine.tasks import Task

BATCH = 8
"""Rows of one forward pass."""


def refer(data: Encoded, task: Task, processor: Any, model: nn.Module, accelerator: Accelerator) -> Encoded:
    """The splits with the task's `reference` in every row; as they are where the task wants none."""
    if not task.refers:
        return data
    model.to(accelerator.device)
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    return replace(
        data, **{name: _referred(split, task, processor, model, accelerator) for name, split in splits.items()}
    )


def _referred(
    split: Split | None, task: Task, processor: Any, model: nn.Module, accelerator: Accelerator
) -> Split | None:
    if split is None:
        return None
    rows, collate = split.single, task.collate(processor)
    by_length = np.arange(len(rows)) if rows.lengths is None else np.argsort(rows.lengths, kind="stable")
    chunks = [by_length[start : start + BATCH].tolist() for start in range(0, len(rows), BATCH)]
    found: list[tuple[int, float]] = []
    with freezing.eval_mode(model), torch.no_grad(), accelerator.autocast():
        for chunk in chunks[accelerator.process_index :: accelerator.num_processes]:
            found += zip(chunk, _values(rows, chunk, task, collate, model, accelerator), strict=True)
    values = [value for _, value in sorted(gather_object(found))]
    return split.with_column("reference", values)


def _values(
    rows: Split, chunk: Sequence[int], task: Task, collate: Any, model: nn.Module, accelerator: Accelerator
) -> Sequence[float]:
    batch = collate(rows.examples(chunk))
    batch = {key: value.to(accelerator.device) if hasattr(value, "to") else value for key, value in batch.items()}
    return task.reference(model(**task.inputs(batch)), batch)
