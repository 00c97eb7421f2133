"""What advice is measured on: the user's own rows and model, loaded once, with the stage of every candidate.

Training and validation rows are pooled, for whoever judges out of fold can train on both; the test split is not even
opened. Nothing here trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import concatenate_datasets

from engine import data, models
from engine.advising.units import EVERYTHING, HEAD, Candidate, Unit, candidates, units
from engine.errors import PlanError, Problem
from engine.frost.prefix import Cache
from engine.learner import Learner
from engine.metrics import SINGLE
from engine.modelling.outlining import outline
from engine.outline import Outline
from engine.plan import Stage, make
from engine.planning.openings import entries
from engine.randomness import stable_seed
from engine.recipe import Recipe
from engine.rows.batches import batching
from engine.schedules.base import StageEntry
from engine.tasks import Facts
from engine.tasks.labels import LABEL
from engine.tasks.labels import encode as label_ids

MOST_ROWS = 5_000
"""Rows that advice looks at; of more, a sample. More rows settle smaller differences and cost as much more."""
HEAD_RATE = 1e-3
"""The head's peak rate where nothing is known yet; a ladder of rates around it is tried on the cache."""


@dataclass
class Bench:
    """A model, its rows, and what could be trained of it."""

    asked: Recipe
    """The user's recipe."""
    recipe: Recipe
    """The same without its stages and adapters: one stage for each candidate."""
    learner: Learner
    outline: Outline
    units: tuple[Unit, ...]
    candidates: dict[str, Candidate]
    stages: dict[str, Stage]
    """Candidate -> the stage that trains it."""
    labels: np.ndarray
    """Ids (rows,)."""
    start: dict[str, torch.Tensor]
    """Every tensor as it was loaded, on the CPU."""
    rate: float
    """The user's own peak rate for what isn't the head."""
    steps: int
    """The length of the user's own recipe, its stages for the head alone left out."""
    available: int
    """Rows that there are; `labels` may be a sample of them."""
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.labels)

    @property
    def facts(self) -> Facts:
        return self.learner.facts

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.recipe.evaluation.metric or self.recipe.task.default_metrics(self.facts)[0]

    @property
    def steps_per_epoch(self) -> int:
        return next(iter(self.stages.values())).steps_per_epoch

    def add(self, candidate: Candidate) -> None:
        """Take one more candidate in."""
        self.candidates[candidate.name] = candidate
        self.stages |= _stages(self.recipe, self.outline, [candidate], self.rows, self.steps)


@dataclass(frozen=True)
class Pool:
    """The rows of a recipe, training and validation together, encoded."""

    rows: data.Rows
    labels: np.ndarray
    available: int
    notes: tuple[str, ...]


def gather(
    recipe: Recipe, root: Path, cache: Cache | None, accelerator: Accelerator, most: int = MOST_ROWS, seed: int = 0
) -> Bench:
    """The bench of a recipe. Raises `PlanError` where its task has no single label for each example."""
    lean, notes = _lean(recipe)
    pool = _pool(lean, root, most, seed)
    bones = models.skeleton(lean, pool.rows.facts, root)
    processor = models.processor(lean, root, bones)
    encoded = data.encode(pool.rows, lean.task, processor)
    loaded = models.load(lean, pool.rows.facts, root, processor)
    drawn = outline(bones, loaded.random)
    found = units(drawn)
    rate, steps = _habits(recipe, drawn, len(pool.labels))
    lean = lean.model_copy(update={"training": lean.training.model_copy(update={"learning_rate": rate})})
    tried = {each.name: each for each in candidates(found, len(drawn.blocks))}
    spread = batching(lean.batch_size, lean.per_device_batch_size, 1)
    facts = pool.rows.facts
    learner = Rows(lean, loaded.model, processor, encoded, facts, accelerator, spread, cache)
    return Bench(
        asked=recipe,
        recipe=lean,
        learner=learner,
        outline=drawn,
        units=found,
        candidates=tried,
        stages=_stages(lean, drawn, list(tried.values()), len(pool.labels), steps),
        labels=pool.labels,
        start={name: tensor.detach().cpu().clone() for name, tensor in learner.tensors().items()},
        rate=rate,
        steps=steps,
        available=pool.available,
        notes=(*notes, *pool.notes, *encoded.notes, *loaded.notes),
    )


class Rows(Learner):
    """A learner that goes over chosen rows, in an order that is the same for every candidate."""

    chosen: np.ndarray = np.empty(0, dtype=np.int64)
    dice: tuple[int | str, ...] = ()
    """What the order of the rows follows from, the epoch aside."""

    def _indices(self, step: int) -> np.ndarray:
        size = self.recipe.batch_size
        # Full batches only: a rest of one row is more than BatchNorm can bear, and the next epoch leaves out others.
        epoch, place = divmod(step, max(1, len(self.chosen) // size))
        if epoch != self.epoch:
            lengths = self.data.train.lengths
            lengths = None if lengths is None else lengths[self.chosen]
            strategy, seed = self.recipe.training.train_sampling_strategy, stable_seed(*self.dice)
            ranks = data.order(len(self.chosen), lengths, strategy, size, seed, "advice", epoch)
            self.epoch, self.indices = epoch, self.chosen[ranks]
        return self.indices[place * size : (place + 1) * size]


def _lean(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as it is measured: no test split, no stages of its own, no adapters, nothing drawn at random."""
    notes = ["adapters are left out here: advice is about weights"] if recipe.adapters else []
    splits = recipe.data.splits.model_copy(update={"test": None})
    if getattr(recipe.data, "streaming", False):
        what = "advice judges every row several times, so rows can't be streamed"
        raise PlanError([Problem(("data", "streaming"), what, "leave the key out, or name a slice: `train[:5000]`")])
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update={"splits": splits}), "adapters": (), "freeze": ()}
    if recipe.task.draws and "augmentation" in type(recipe.task).model_fields:
        changes["task"] = recipe.task.model_copy(update={"augmentation": None})
        notes.append("measured without augmentation, so that activations can be kept")
    return recipe.model_copy(update=changes), notes


def _pool(recipe: Recipe, root: Path, most: int, seed: int) -> Pool:
    rows = data.read(recipe, root)
    if rows.facts.problem != SINGLE or recipe.task.target != LABEL or rows.facts.members != 1:
        what = f"advice needs one label for each example, and {recipe.task.type} has something else here"
        raise PlanError([Problem(("task",), what, "`frostline sweep` serves every task")])
    parts = [rows.train] if rows.validation is None else [rows.train, rows.validation]
    together = concatenate_datasets(parts)
    available, notes = len(together), []
    if available > most:
        drawn = np.random.default_rng(stable_seed(seed, "rows")).permutation(available)[:most]
        together = together.select(np.sort(drawn))
        notes.append(f"{most:,} of {available:,} rows are looked at; with all of them more layers may be worth it")
    labels = np.array(label_ids(together[LABEL], rows.facts), dtype=np.int64)
    return Pool(data.Rows(together, None, None, rows.facts, ()), labels, available, tuple(notes))


def _habits(recipe: Recipe, drawn: Outline, rows: int) -> tuple[float, int]:
    """The user's own peak rate for what isn't the head, and how many steps that trains."""
    try:
        listed = [entry for entry, _ in entries(recipe, drawn)]
    except ValueError:
        listed = []
    own = recipe.model_copy(update={"adapters": (), "stages": tuple(listed) or recipe.stages})
    plan = make(own, drawn, rows)
    heads = {name for unit in units(drawn) if unit.name == HEAD for name in unit.parameters}
    deep = [stage for stage in plan.stages if not set(stage.trainable) <= heads] or list(plan.stages)
    rates = [group.learning_rate for stage in deep for group in stage.groups if not set(group.parameters) <= heads]
    return max(rates, default=recipe.training.learning_rate), sum(stage.steps for stage in deep)


def _stages(recipe: Recipe, drawn: Outline, tried: Sequence[Candidate], rows: int, steps: int) -> dict[str, Stage]:
    """The stage of each candidate: long enough for activations to be worth keeping."""
    most = max(steps, 2 * ceil(rows / recipe.batch_size) + 1)
    return {each.name: make(_alone(recipe, each, most), drawn, rows).stages[0] for each in tried}


def _alone(recipe: Recipe, candidate: Candidate, steps: int) -> Recipe:
    """A recipe whose one stage trains a candidate and the head."""
    everything = candidate.name == EVERYTHING
    stage = StageEntry(
        name=candidate.slug,
        unfreeze=() if everything else ("@head", *candidate.opens),
        learning_rate={"@head": HEAD_RATE},
        steps=steps,
    )
    return recipe.model_copy(update={"freeze": () if everything else (".*",), "stages": (stage,)})
