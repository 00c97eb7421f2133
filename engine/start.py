"""Everything that has to be true before step 1: the recipe read, the data checked, the plan made, the devices counted.

It trains nothing. Whatever is wrong is said here, before a model is downloaded wherever that can be known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from engine import data, models
from engine.batches import batching
from engine.errors import REFUSED, RunError
from engine.folder import RunFolder, manifest
from engine.learner import Learner
from engine.load import Loaded
from engine.outline import Outline
from engine.plan import Plan
from engine.records import Event, Note, Started
from engine.tasks import Facts
from engine.train import train

TIMEOUT = timedelta(minutes=5)
"""How long a device waits for another before the run ends; the default of half an hour hides a dead one."""


@dataclass(frozen=True)
class Draft:
    """A plan and what it was made from."""

    plan: Plan
    outline: Outline
    rows: data.Rows | None
    """None where the plan was made for a given number of examples, without reading the data."""


def draft(loaded: Loaded, root: Path, examples: int | None = None, random: tuple[str, ...] = ()) -> Draft:
    """The plan of a recipe; with `examples` the data stay unread and the labels are the config's own."""
    recipe = loaded.recipe
    rows = data.read(recipe, root) if examples is None else None
    facts = rows.facts if rows else Facts()
    bones = models.skeleton(recipe, facts, root)
    plan, outline = models.draft(recipe, bones, len(rows.train) if rows else examples or 0, random)
    return Draft(plan, outline, rows)


def run(loaded: Loaded, name: str, root: Path, runs: Path) -> Iterator[Event]:
    """Everything from a recipe to a saved model, as events. On every device but the first one it yields none."""
    accelerator = launched()
    recipe, folder = loaded.recipe, RunFolder(runs / name)
    with accelerator.main_process_first():
        drafted = draft(loaded, root)
    rows = drafted.rows
    model = models.load(recipe, rows.facts, root)
    if model.random:
        bones = models.skeleton(recipe, rows.facts, root)
        plan, _ = models.draft(recipe, bones, len(rows.train), model.random)
    else:
        plan = drafted.plan
    processor = models.processor(recipe, root)
    with accelerator.main_process_first():
        encoded = data.encode(rows, recipe.task, processor)
    spread = batching(recipe.batch_size, recipe.per_device_batch_size, accelerator.num_processes)
    learner = Learner(recipe, model.model, processor, encoded, rows.facts, accelerator, spread)
    fingerprints = {"train": encoded.train.fingerprint}
    if accelerator.is_main_process:
        folder.clear()
        folder.open(
            loaded.source.resolved, plan, manifest(loaded.source.resolved, plan, spread.processes, fingerprints)
        )
    started = Started(name, plan.fingerprint, spread.processes, str(accelerator.device), spread.reason)
    notes = (Note(sentence) for sentence in (*rows.notes, *encoded.notes, *model.notes))
    yield from _recorded((started, *notes), accelerator, folder)
    yield from _recorded(train(learner, plan, folder), accelerator, folder)
    accelerator.end_training()


def _recorded(events: Any, accelerator: Accelerator, folder: RunFolder) -> Iterator[Event]:
    for event in events:
        if accelerator.is_main_process:
            folder.record(event)
            yield event


def launched() -> Accelerator:
    """The accelerator, once it agrees with the launcher about the number of processes.

    Raises `RunError` where they disagree: every process would believe it is alone, or one would do the work of many.
    """
    cpu = not (torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        sentence = f"the launcher started {asked} processes and accelerate counts {accelerator.num_processes}"
        raise RunError(f"{sentence}; on CPUs use `accelerate launch --multi_gpu --num_processes {asked}`", REFUSED)
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        sentence = "`accelerate launch --cpu --num_processes N` starts one process, whatever N is"
        raise RunError(f"{sentence}; use `--multi_gpu --num_processes N`, which runs on CPUs as well", REFUSED)
    return accelerator
