"""Recipe -> model: its skeleton on the meta device for a plan, the real one for a run, and the outline of either.

Weights come from safetensors only, and no code of a checkpoint ever runs. What can't be found, or needs a network or
a permission, is one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from engine.adapters import attach
from engine.adapters import config as adapter_config
from engine.errors import ENVIRONMENT, PlanError, Problem, RunError
from engine.outline import Outline
from engine.outlining import outline
from engine.packages import locate
from engine.plan import Attachment, Plan, attachments, make
from engine.randomness import stable_seed
from engine.recipe import Model, Recipe
from engine.tasks import Facts


@dataclass(frozen=True)
class Loaded:
    """A model with its weights."""

    model: nn.Module
    random: tuple[str, ...]
    """Parameters that the checkpoint didn't fill, so they start at random."""
    notes: tuple[str, ...]
    """What a user should know of how it was loaded."""


def source(model: Model, root: Path) -> str:
    """The folder or the Hub's name that transformers loads a recipe's model from."""
    if model.path.startswith("package:"):
        return str(locate(model.path, ("model", "path")))
    local = root / model.path
    return str(local) if local.is_dir() else model.path


def config(recipe: Recipe, facts: Facts, root: Path) -> Any:
    """The model's config with what the data say of the task: labels, their names, kind of problem."""
    settings: dict[str, Any] = dict(facts.settings)
    if facts.labels:
        settings["id2label"] = dict(enumerate(facts.labels))
        settings["label2id"] = {name: index for index, name in enumerate(facts.labels)}
    if facts.problem:
        settings["problem_type"] = facts.problem
    with _said_plainly(recipe.model):
        return transformers.AutoConfig.from_pretrained(
            source(recipe.model, root), revision=recipe.model.revision, trust_remote_code=False, **settings
        )


def processor(recipe: Recipe, root: Path) -> Any:
    """What turns rows into the model's inputs: tokenizer, image processor or feature extractor."""
    kind = getattr(transformers, recipe.task.processor)
    with _said_plainly(recipe.model):
        return kind.from_pretrained(source(recipe.model, root), revision=recipe.model.revision, trust_remote_code=False)


def skeleton(recipe: Recipe, facts: Facts, root: Path) -> nn.Module:
    """The model on the meta device: names and shapes, built from its config alone."""
    kind = getattr(transformers, recipe.task.auto)
    with torch.device("meta"), _said_plainly(recipe.model), _quietly():
        return kind.from_config(config(recipe, facts, root), trust_remote_code=False)


def load(recipe: Recipe, facts: Facts, root: Path) -> Loaded:
    """The real model in float32 or the recipe's `dtype`, its new parts initialised from the recipe's seed alone."""
    settings = config(recipe, facts, root)
    kind = getattr(transformers, recipe.task.auto)
    torch.manual_seed(stable_seed(recipe.seed, "model"))
    with _said_plainly(recipe.model), _quietly():
        model, info = kind.from_pretrained(
            source(recipe.model, root),
            config=settings,
            revision=recipe.model.revision,
            dtype=getattr(torch, recipe.model.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head of another size is a new head, and told of below
            output_loading_info=True,
            **({"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}),
        )
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    random = sorted({*info["missing_keys"], *mismatched} & {name for name, _ in model.named_parameters()})
    notes = [f"`{name}` has another shape in the checkpoint and starts afresh" for name in sorted(mismatched)]
    if info["unexpected_keys"]:
        notes.append(f"{len(info['unexpected_keys'])} tensors of the checkpoint have no place in this model")
    return Loaded(model, tuple(random), tuple(notes))


def draft(recipe: Recipe, bones: nn.Module, examples: int, random: tuple[str, ...] = ()) -> tuple[Plan, Outline]:
    """The plan of a recipe for a skeleton, adapters attached to it, and the outline that the plan was made from."""
    bare = outline(bones, random)
    wanted = attachments(recipe, bare)
    for attachment in wanted:
        put(bones, attachment)
    full = outline(bones, random, bare) if wanted else bare
    return make(recipe, full, examples), full


def put(model: nn.Module, attachment: Attachment) -> None:
    """Attach an adapter; raises `PlanError` where PEFT refuses it."""
    try:
        attach(model, attachment.name, adapter_config(attachment.kind, attachment.fields, attachment.targets))
    except ValueError as error:
        raise PlanError([Problem(attachment.key, str(error))]) from error


@contextmanager
def _said_plainly(model: Model) -> Iterator[None]:
    """Turns transformers' and the Hub's many ways to fail into one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        words = " ".join(str(error).split())
        kind = type(error).__name__
        if "gated" in words.lower() or kind == "GatedRepoError":
            raise RunError(
                f"{model.path} is gated: ask for access on its page, then `hf auth login`", ENVIRONMENT
            ) from error
        if any(sign in words.lower() for sign in ("couldn't connect", "offline", "connection", "resolve", "cached")):
            missing = f"{model.path} is not on this machine and the Hub can't be reached"
            raise RunError(f"{missing}: check the network, HF_HOME and HF_HUB_OFFLINE", ENVIRONMENT) from error
        if isinstance(error, PermissionError) or "Errno" in words:
            raise RunError(f"{model.path} can't be read: {words}", ENVIRONMENT) from error
        raise PlanError([Problem(("model", "path"), f"{model.path} can't be loaded: {words[:300]}")]) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """No bars and no load report: what they say is said in the run's own notes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
