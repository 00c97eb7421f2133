"""How good a model is on a split: every example counted once, whatever the number of devices. It never trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from engine import freezing
from engine.data import Split
from engine.errors import RunError
from engine.learner import Learner

Row = tuple[int, Any, Any]
"""An example's index in its split, what the model answered, and what was right."""


@dataclass(frozen=True)
class Judgement:
    """What an evaluation has found."""

    metrics: dict[str, float]
    """The loss and every metric of the recipe."""
    confusion: list[list[int]] | None
    """How often each label (row) was taken for each (column), where the task has labels."""
    predictions: list[Any]
    """What the model answered, in the order of the split."""
    references: list[Any]
    """What was right."""


def judge(learner: Learner, split: Split) -> Judgement:
    """The learner's model as it stands, on every example of a split. Raises `RunError` where one is lost on the way."""
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    size = learner.recipe.evaluation.batch_size or max(learner.batching.micro, 8)
    by_length = np.arange(len(split)) if split.lengths is None else np.argsort(split.lengths, kind="stable")
    all_chunks = [by_length[start : start + size].tolist() for start in range(0, len(split), size)]
    chunks = all_chunks[rank::processes]
    # It takes all devices to compute with a model that is spread over them: one that is done goes on for the others.
    idle = all_chunks[:1] * (-(-len(all_chunks) // processes) - len(chunks)) if learner.spread else []
    rows: list[Row] = []
    sums: list[tuple[float, int]] = []
    written = learner.task.writes and bool(learner.metrics)
    with freezing.eval_mode(learner.model):
        for turn, chunk in enumerate([*chunks, *idle]):
            batch = learner.collated(split, chunk)
            if hasattr(learner, "shortcut"):
                learner.shortcut.feed(split, chunk, batch)
            with learner.accelerator.autocast():  # on the bare model: DDP's hooks have nothing to do here
                outputs = learner.task.forward(learner.model, batch)
            if turn >= len(chunks):
                continue
            weight = learner.task.weight(batch)
            sums.append((float(outputs.loss) * weight if weight else 0.0, weight))
            if not written:
                rows += zip(chunk, *learner.task.answers(outputs, batch), strict=True)
        if written:
            rows = _written(learner, split, chunks)
    return _scored(learner, split, gather_object(rows), gather_object(sums))


def _written(learner: Learner, split: Split, chunks: Sequence[list[int]]) -> list[Row]:
    """What the model writes for some examples, and what it should."""
    rows: list[Row] = []
    with learner.in_full(), learner.accelerator.autocast():
        for chunk in chunks:
            answers = learner.task.write(learner.model, learner.collated(split, chunk), learner.processor)
            rows += zip(chunk, *answers, strict=True)
    return rows


def _scored(learner: Learner, split: Split, rows: Sequence[Row], sums: Sequence[tuple[float, int]]) -> Judgement:
    rows = sorted(rows, key=lambda row: row[0])
    if [index for index, _, _ in rows] != list(range(len(split))):
        raise RunError(f"{len(rows)} answers came back for {len(split)} examples; an evaluation counts each once")
    weight = sum(part for _, part in sums)
    # Summed exactly, so that the order of the devices is no part of the result.
    loss = math.fsum(part for part, _ in sums) / weight if weight else math.nan
    predictions, references = [row[1] for row in rows], [row[2] for row in rows]
    scores = learner.task.score(predictions, references, learner.metrics, learner.facts)
    confusion = learner.task.confusion(predictions, references, learner.facts)
    return Judgement({"loss": loss, **scores}, confusion, predictions, references)
