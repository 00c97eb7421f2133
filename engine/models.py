"""Recipe -> model: its skeleton on the meta device for a plan, the real one for a run, and the outline of either.

Weights come from safetensors only, and no code of a checkpoint ever runs. What can't be found, or needs a network or
a permission, is one sentence.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from engine.adapters import attach, rewrites, try_merging
from engine.adapters import config as adapter_config
from engine.errors import ENVIRONMENT, FrostlineError, PlanError, Problem, RunError
from engine.modelling import narrowing, packed, quantizing, trust, vocabulary
from engine.modelling.outlining import outline, pictured
from engine.optim import schedule_problems
from engine.outline import Outline
from engine.packages import PREFIX, locate
from engine.plan import Attachment, Plan, attachments, make
from engine.planning.forecast import Sizes
from engine.prompts import virtual_tokens
from engine.randomness import stable_seed
from engine.recipe import Model, Recipe
from engine.tasks import Facts

PATH = ("model", "path")
_HUB_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_UNLIMITED = 10**30
"""What a tokenizer without a limit says."""


@dataclass(frozen=True)
class Loaded:
    """A model with its weights."""

    model: nn.Module
    random: tuple[str, ...]
    """Parameters that the checkpoint didn't fill, so they start at random."""
    notes: tuple[str, ...]
    """What a user should know of how it was loaded."""


def source(model: Model, root: Path) -> str:
    """The folder or the Hub's name that transformers loads a recipe's model from; folders lie below the data root."""
    path = model.path
    if path.startswith(PREFIX):
        return str(locate(path, PATH))
    try:
        place = (root / path).resolve()
        inside = place.is_relative_to(root.resolve())
        if inside and place.is_dir():
            return str(place)
        # transformers would take a folder of the current directory, wherever the root is
        outside, named = not inside or Path(path).exists(), _HUB_NAME.fullmatch(path)
    except (OSError, ValueError, RuntimeError):  # a name too long, with a null character, or a loop of links
        outside, named = False, None
    if outside:
        raise PlanError([Problem(PATH, f"`{path}` lies outside the data root", "move it below or choose another root")])
    if not named:
        what = f"`{path[:96]}` is no folder below the data root, and no name of the Hub"
        raise PlanError([Problem(PATH, what, "paths start at the data root; names of the Hub look like `owner/name`")])
    return path


def config(recipe: Recipe, facts: Facts, root: Path) -> Any:
    """The model's config with what the data say of the task: labels, their names, kind of problem."""
    settings: dict[str, Any] = dict(facts.settings)
    if facts.labels:
        settings["id2label"] = dict(enumerate(facts.labels))
        settings["label2id"] = {name: index for index, name in enumerate(facts.labels)}
        settings.pop("num_labels", None)  # follows from their names; given besides them transformers warns of it
    if facts.problem:
        settings["problem_type"] = facts.problem
    place, revision = source(recipe.model, root), recipe.model.revision
    with _said_plainly(recipe.model), quietly():
        packs = packed.file(recipe.model, place)
        written, _ = transformers.PreTrainedConfig.get_config_dict(place, revision=revision, **packs)
        trust.refuse_config(recipe.model, written)
        quantizing.refuse_checkpoint(recipe.model, written)
        _refuse_timm(recipe.model, written)
        how = {"revision": revision, "trust_remote_code": False, **packs}
        made = transformers.AutoConfig.from_pretrained(place, **how, **settings)
        trust.refuse_parts(recipe.model, made)
    return made


def _refuse_timm(model: Model, written: Mapping[str, Any]) -> None:
    """Raise `RunError` for a timm model where timm can't be imported: it needs a torchvision that fits this torch."""
    if "architecture" not in written or written.get("model_type", "timm_wrapper") != "timm_wrapper":
        return
    try:
        importlib.import_module("timm")
    except Exception as error:  # a torchvision built for another torch raises whatever it comes upon first
        what = f"{model.path} is a timm model, and timm doesn't import here ({' '.join(str(error).split())[:120]})"
        advice = "install timm with a torchvision built for this torch, or take a model that transformers knows itself"
        raise RunError(f"{what}; {advice}", ENVIRONMENT) from error


def processor(recipe: Recipe, root: Path, bones: nn.Module | None = None) -> Any:
    """What turns rows into the model's inputs: tokenizer, image processor or feature extractor.

    With the model or its skeleton, a tokenizer's limit is brought down to the positions that the model has.
    """
    kind, place = getattr(transformers, recipe.task.processor), source(recipe.model, root)
    with _said_plainly(recipe.model), quietly():
        made = kind.from_pretrained(
            place,
            revision=recipe.model.revision,
            trust_remote_code=False,
            **packed.written(recipe.model, place, trust.has(recipe.model, place, "tokenizer.json")),
            **recipe.task.processor_settings,
        )
    tokenizer = getattr(made, "tokenizer", made)
    recipe.task.equip(made, root)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        vocabulary.complete(tokenizer, recipe.model)
        tokenizer.model_max_length = min(tokenizer.model_max_length, *_positions(bones)) - virtual_tokens(recipe)
    return made


def _positions(model: nn.Module | None) -> Iterator[int]:
    """The lengths beyond which the model has no positions: by its config, and by its table of them."""
    yield _UNLIMITED
    if model is None:
        return
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    yield most if most > 0 else _UNLIMITED  # XLNet says -1
    for name, table in model.named_modules():
        # RoBERTa and its kin begin to count after the padding's row.
        if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None:
            yield table.num_embeddings - table.padding_idx - 1


def skeleton(recipe: Recipe, facts: Facts, root: Path) -> nn.Module:
    """The model on the meta device: names and shapes, built from its config alone."""
    settings = config(recipe, facts, root)
    if recipe.model.pad_token or recipe.model.grows:
        made = processor(recipe, root)
        vocabulary.fit(settings, getattr(made, "tokenizer", made))
    kind = getattr(transformers, recipe.task.auto)
    with torch.device("meta"), _said_plainly(recipe.model), quietly():
        model = kind.from_config(settings, trust_remote_code=False)
    trust.refuse_size(recipe.model, model)
    vocabulary.refuse_unread(recipe, settings.get_text_config(), model)
    recipe.task.trim(model)
    if getattr(model, "main_input_name", "") == "pixel_values" and not pictured(settings):
        model.sides = _sides(processor(recipe, root))  # pyright: ignore
    return model.to("meta")  # a parameter that is made by `torch.Tensor(size)`, as wav2vec2's mask, minds no device


def load(
    recipe: Recipe,
    facts: Facts,
    root: Path,
    prepares: Any = None,
    bones: nn.Module | None = None,
    plan: Plan | None = None,
) -> Loaded:
    """The real model in float32 or the recipe's `dtype`, its new parts initialised from the recipe's seed alone.

    `prepares` is what `processor` made: where it is a tokenizer, the model pads as that does. `bones` is the skeleton,
    where there is one already. What `plan` never trains is quantised or kept in `frozen_dtype`, where the recipe says
    so and there is a plan.
    """
    settings, place = config(recipe, facts, root), source(recipe.model, root)
    trust.refuse_weights(recipe.model, place)
    trust.refuse_memory(recipe.model, bones or skeleton(recipe, facts, root))
    tokenizer = getattr(prepares, "tokenizer", prepares)
    padded = vocabulary.pads_alike(settings, tokenizer)
    kind = getattr(transformers, recipe.task.auto)
    torch.manual_seed(stable_seed(recipe.seed, "model"))
    with _said_plainly(recipe.model), trust.no_pickles(recipe.model), quietly():
        model, info = kind.from_pretrained(
            place,
            config=settings,
            revision=recipe.model.revision,
            dtype=getattr(torch, recipe.model.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head of another size is a new head, and told of below
            output_loading_info=True,
            **packed.weights(recipe.model, place),
            **quantizing.weights(recipe.model, plan, bones),
            **({"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}),
        )
    unpacked = packed.forget(recipe.model, model)
    recipe.task.trim(model)
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    random = sorted({*info["missing_keys"], *mismatched} & {name for name, _ in model.named_parameters()})
    notes = [*unpacked, *padded, *vocabulary.grow(model, tokenizer, recipe), *_mended(model)]
    notes += [f"`{name}` has another shape in the checkpoint and starts afresh" for name in sorted(mismatched)]
    if info["unexpected_keys"]:
        notes.append(f"{len(info['unexpected_keys'])} tensors of the checkpoint have no place in this model")
    narrowing.narrow(model, recipe.model, plan)
    return Loaded(model, tuple(random), tuple(notes))


def _mended(model: nn.Module) -> list[str]:
    """Turn BatchNorm's momentum round where a config counts it as TensorFlow does: there it is what stays of the past.

    EfficientNet's configs say 0.99, by which torch would forget all but the last batch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.momentum or 0) > 0.5]
    for norm in norms:
        norm.momentum = round(1 - (norm.momentum or 0), 6)
    if not norms:
        return []
    if getattr(model.config, "batch_norm_momentum", 0) > 0.5:
        model.config.batch_norm_momentum = norms[0].momentum
    said = f"{1 - norms[0].momentum:g} of the past is meant to stay: momentum {norms[0].momentum:g} in torch's words"
    return [f"{len(norms)} BatchNorms keep almost nothing but the last batch as the config reads; {said}"]


def _sides(processor: Any) -> tuple[int, int]:
    """Height and width of the pictures that an image processor makes, about: some keep a picture's own proportions."""
    cropped = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = cropped or getattr(processor, "size", None) or {}
    height = size.get("height") or size.get("shortest_edge") or 224
    return height, size.get("width") or height


def draft(
    recipe: Recipe, bones: nn.Module, examples: int, random: tuple[str, ...] = (), sizes: Sizes | None = None
) -> tuple[Plan, Outline]:
    """The plan of a recipe for a skeleton, adapters attached to it, and the outline that the plan was made from."""
    narrowing.refuse(recipe)
    bare = replace(outline(bones, random), grown=vocabulary.tables(bones) if recipe.model.grows else ())
    wanted = attachments(recipe, bare)
    for attachment in wanted:
        put(bones, attachment, tried=True)
    full = outline(bones, random, bare) if wanted else bare
    plan = planned(recipe, full, examples, sizes)
    quantizing.refuse(recipe, plan)
    return plan, full


def planned(recipe: Recipe, read: Outline, examples: int, sizes: Sizes | None = None) -> Plan:
    """The plan of a recipe for an outline that is known already, adapters included."""
    plan = make(recipe, read, examples, sizes)
    if problems := schedule_problems(plan.stages):
        raise PlanError(problems)
    return plan


def put(model: nn.Module, attachment: Attachment, tried: bool = False) -> frozenset[str]:
    """Attach an adapter; returns the weights that it has rewritten for its start (PiSSA, OLoRA).

    Raises `PlanError` where PEFT refuses it, or couldn't merge it where that is `tried` too.
    """
    below = {f"{target}.weight" for target in attachment.targets} if rewrites(attachment.fields) else set()
    try:
        attach(model, attachment.name, adapter_config(attachment.kind, attachment.fields, attachment.targets))
        if tried:
            try_merging(model)
    except ValueError as error:
        raise PlanError([Problem(attachment.key, str(error))]) from error
    return frozenset(below)


@contextmanager
def _said_plainly(model: Model) -> Iterator[None]:
    """Turns transformers' and the Hub's many ways to fail into one sentence."""
    try:
        yield
    except SafetensorError as error:
        what = f"{model.path} holds a damaged safetensors file ({error})"
        raise RunError(f"{what}: copy or download it again", ENVIRONMENT) from error
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
        if "no file named model.safetensors" in words or "does not appear to have a file named model.saf" in words:
            what = f"{model.path} holds no model.safetensors; other weights are pickles, which are never opened"
            raise PlanError([Problem(PATH, what, "save it anew with `save_pretrained`")]) from error
        said = re.split(r"(?<=[a-z`'])[.:] ", words)[0].removesuffix(".")
        raise PlanError([Problem(PATH, f"{model.path} can't be loaded: {said[:300]}")]) from error
    except FrostlineError:
        raise
    except Exception as error:  # a config can name and size what it likes: transformers trips over it in its own ways
        words = f"{type(error).__name__}, {' '.join(str(error).split())[:200]}"
        what = f"{model.path} can't be loaded: what its files say fits no model ({words})"
        raise PlanError([Problem(PATH, what, "download it again, or take another")]) from error


@contextmanager
def quietly() -> Iterator[None]:
    """No bars, no load report, no tale of every try to reach the Hub: what they say is said in the run's own words."""
    from transformers.utils import logging

    level, hub = logging.get_verbosity(), getLogger("huggingface_hub")
    hub_level = hub.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.setLevel(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
