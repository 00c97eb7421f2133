"""Everything that has to be true before step 1: the recipe fits, the data are sound, the devices are counted.

It trains nothing. Whatever is wrong is said here, before a model is downloaded wherever that can be known.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from engine import checkpoint, data, models, optim, report, store
from engine.devices import memory, shards, speed
from engine.devices.processes import asked_to_stop, first, launched, peers, together
from engine.errors import ENVIRONMENT, PlanError, Problem, RunError
from engine.frost.prefix import Cache
from engine.keeping.durable import lock
from engine.keeping.folder import RunFolder
from engine.keeping.movement import Start
from engine.keeping.position import Position, resume
from engine.keeping.proof import Digests, digests
from engine.keeping.reference import refer
from engine.learner import Learner
from engine.load import Loaded
from engine.outline import Outline
from engine.plan import Plan
from engine.planning.forecast import Sizes
from engine.recipe import Recipe
from engine.records import Event, Finished, Note, StageEnded, Started
from engine.rows.batches import batching
from engine.tasks import Facts
from engine.tracking import followed
from engine.train import Loop

SAMPLED = 20_000
"""Rows whose lengths are looked at for a plan; of more, a sample."""


@dataclass(frozen=True)
class Draft:
    """A plan and what it was made from."""

    plan: Plan
    outline: Outline
    rows: data.Rows | None
    """None where the plan was made for a given number of examples, without reading the data."""


def draft(loaded: Loaded, root: Path, examples: int | None = None) -> Draft:
    """The plan of a recipe, no weights read; with `examples` the data stay unread and the labels are the config's."""
    recipe = loaded.recipe
    models.config(recipe, Facts(), root)  # a model that isn't there is told of before the data are read
    rows = data.read(recipe, root) if examples is None else None
    bones = models.skeleton(recipe, rows.facts if rows else Facts(), root)
    if rows is None:
        return Draft(*models.draft(recipe, bones, examples or 0), None)
    return Draft(*models.draft(recipe, bones, *_counted(recipe, rows, bones, root)), rows)


def timed(drafted: Draft) -> Draft:
    """The same draft with an estimate of time: this machine is tried for half a second at a block of the model's width.

    The processor is tried, for a plan starts no device.
    """
    plan, outline = drafted.plan, drafted.outline
    block = next(iter(outline.blocks), None)
    taken = next((m.price.takes for m in outline.modules if m.name == block), None)
    tokens = round(plan.batch_size * (plan.sizes.mean or 1))
    width = taken.at(plan.sizes.mean) / (plan.sizes.mean or 1) if taken else 0
    found = speed.rate(min(1024, max(32, round(width or 256))), min(2048, max(32, tokens)))  # as fast as wider ones
    return replace(drafted, plan=plan.timed(found))


def _counted(recipe: Recipe, rows: data.Rows, bones: nn.Module, root: Path) -> tuple[int, tuple[str, ...], Sizes]:
    """Training examples, nothing of weights, and how many rows there are and how long.

    There is one example a row, but where a task makes several of a long one. Many rows are counted by a sample of them.
    """
    whole = rows.stream is not None or recipe.task.windowed or len(rows.train) <= SAMPLED
    some = rows.train if whole else rows.train.select(range(0, len(rows.train), len(rows.train) // SAMPLED))
    read = replace(rows, train=some, validation=None, test=None)
    encoded = data.encode(read, recipe.task, models.processor(recipe, root, bones)).train
    examples = len(encoded) if whole else len(rows.train)
    judged = len(rows.validation) if rows.validation is not None else 0
    members = rows.facts.members
    found = replace(data.sizes(encoded, None), train=examples * members, validation=judged * members)
    return examples, (), found


def run(
    loaded: Loaded,
    name: str,
    root: Path,
    runs: Path,
    fresh: bool = False,
    cache: Path | None = None,
    log_with: Sequence[str] = (),
) -> Iterator[Event]:
    """Everything from a recipe to a saved model, as events; only the main process yields any.

    A run that was cut short goes on where its newest whole checkpoint was taken; `fresh` starts over instead.
    Activations are kept in `cache`, or among the runs; trackers of `log_with` hear of the training as well.
    """
    accelerator, folder = launched(), RunFolder(runs / name)
    with contextlib.ExitStack() as held:
        held.enter_context(peers(accelerator))
        together(accelerator, lambda: held.enter_context(lock(folder.path)) or None)
        if fresh:
            together(accelerator, folder.clear)
        if together(accelerator, lambda: folder.finished(loaded.source.resolved)):
            yield Note(f"{folder.path} holds a finished run; `--fresh` trains it again")
            return
        learner, plan, notes, base = _ready(loaded, root, cache or runs / store.FOLDER, accelerator)
        # What is loaded by now stays to the end: each collection would look at a million objects for nothing.
        gc.freeze()
        held.callback(gc.unfreeze)
        before, start = digests(learner.model), Start(learner.model)
        position, skipped = _position(loaded, learner, plan, folder, before)
        started = Started(
            name, plan.fingerprint, accelerator.num_processes, str(accelerator.device), learner.batching.reason, base
        )
        said = (started, *map(Note, (*notes, *skipped)))
        yield from _recorded(said, accelerator, folder)
        held.enter_context(asked_to_stop(lambda: setattr(learner, "told_to_stop", True)))
        events = Loop(learner, plan, folder, position, before, start).events()
        events = followed(events, log_with, accelerator, folder.path, name, loaded.source.resolved)
        yield from _recorded(events, accelerator, folder)
        accelerator.end_training()


def cache_of(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Cache | None:
    """Where the recipe's activations are kept, on this process's share of them."""
    wanted = recipe.cache
    if wanted.mode == "off":
        return None
    return Cache(
        folder=folder,
        dtype=wanted.dtype,
        budget=round(wanted.budget * 1e9),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )


def _refuse_half(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise `PlanError` where weights of half precision would meet float32 ones in one product."""
    if recipe.model.dtype != "float32" and accelerator.mixed_precision == "no":
        what = f"what trains is float32 and can't be multiplied with {recipe.model.dtype} as it is"
        launch = f"`accelerate launch --mixed_precision {'bf16' if recipe.model.dtype == 'bfloat16' else 'fp16'}`"
        raise PlanError([Problem(("model", "dtype"), what, f"run it by {launch}, or leave the key out")])


def _ready(
    loaded: Loaded, root: Path, cache: Path, accelerator: Accelerator
) -> tuple[Learner, Plan, tuple[str, ...], int]:
    """The learner with its model and data, the plan, what the user should know of them, and the bytes taken before."""
    recipe = loaded.recipe
    together(accelerator, lambda: _refuse_half(recipe, accelerator))
    together(accelerator, lambda: shards.refuse(recipe, accelerator))
    together(accelerator, lambda: models.config(recipe, Facts(), root) and None)  # before the data are read
    rows = first(accelerator, lambda: data.read(recipe, root))
    bones = models.skeleton(recipe, rows.facts, root)
    drafted, outline = models.draft(recipe, bones, rows.count)  # refuse before any download
    optim.obtain(recipe.training)
    processor = models.processor(recipe, root, bones)
    encoded = first(accelerator, lambda: data.encode(rows, recipe.task, processor))
    base = memory.taken(accelerator.device)
    model = models.load(recipe, rows.facts, root, processor, bones, drafted)
    encoded = refer(encoded, recipe.task, processor, model.model, accelerator)
    sizes = data.sizes(encoded.train, encoded.validation)
    plan = models.planned(recipe, replace(outline, random=model.random), len(encoded.train), sizes)
    spread = batching(recipe.batch_size, recipe.per_device_batch_size, accelerator.num_processes)
    learner = Learner(
        recipe, model.model, processor, encoded, rows.facts, accelerator, spread, cache_of(recipe, cache, accelerator)
    )
    return learner, plan, (*rows.notes, *encoded.notes, *model.notes), base


def _position(
    loaded: Loaded, learner: Learner, plan: Plan, folder: RunFolder, before: Digests
) -> tuple[Position, list[str]]:
    """Where to begin, and what was passed over on the way: the newest whole checkpoint, or the very start."""
    recipe, prints = loaded.source.resolved, _prints(learner.data, before)
    accelerator = learner.accelerator

    def look() -> tuple[Path | None, list[str]]:
        skipped: list[str] = []
        found = checkpoint.newest(folder.checkpoints, skipped)
        if found is None:
            folder.clear()
        else:
            folder.refuse_changes(recipe, prints, found.state["stage"] + (found.state["stage_step"] > 0))
            skipped += filter(None, [folder.cut_records(found.state["records"])])
        folder.open(recipe, plan, accelerator.num_processes, prints)
        return (found.path if found else None), skipped

    path, skipped = together(accelerator, look)
    if not folder.path.exists():
        what = f"{folder.path}: the first process writes there, and this one on another host doesn't see it"
        raise RunError(f"{what}; give all hosts the same storage", ENVIRONMENT)
    if path is None:
        return Position(), skipped
    found = checkpoint.verify(path)
    position = resume(found, learner, plan)
    return position, [*skipped, f"goes on from {found.name}"]


def _prints(encoded: data.Encoded, before: Digests) -> dict[str, str]:
    """The fingerprint of each split, and of the model that the run begins with."""
    splits = {name: getattr(encoded, name) for name in ("train", "validation", "test")}
    prints = {f"data.{name}": split.fingerprint for name, split in splits.items() if split is not None}
    return {**prints, "model": hashlib.sha256(repr(sorted(before.items())).encode()).hexdigest()}


def _recorded(events: Iterable[Event], accelerator: Accelerator, folder: RunFolder) -> Iterator[Event]:
    for event in events:
        if accelerator.is_main_process:
            folder.record(event)
            yield event
            if isinstance(event, StageEnded | Finished):
                yield from _reported(folder)


def _reported(folder: RunFolder) -> Iterator[Event]:
    """Write the report of what is on record so far; no run ends for want of a page, but it says so."""
    try:
        report.write(folder.path)
    except Exception as error:
        note = Note(f"no report was written ({error}); `frostline report {folder.path}` tries again")
        folder.record(note)
        yield note
