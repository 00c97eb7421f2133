"""What every tool's reader is, the recipe that it drafts, and the keys that all share with transformers' Trainer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

from engine.drafting import FILES
from engine.importing.config import Config
from engine.importing.parameters import EVERYTHING, fold
from engine.recipe import OptimizerName
from engine.schedules.base import SchedulerName

SHARES = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
COUNTS = ("save_steps", "save_total_limit", "logging_steps")
"""Keys of the Trainer that `training` has by the same name: real numbers, and whole ones."""
OPTIMIZERS = {"adamw_hf": "adamw_torch", "adamw": "adamw_torch", "adam": "adamw_torch"}


@dataclass(frozen=True)
class Given:
    """What the command line says beside the file, and in place of it."""

    model: str = ""
    task: str = ""
    data: str = ""
    devices: int = 1
    """Devices that the other tool's run had: its batch was one of each of them."""


@dataclass(frozen=True)
class Words:
    """What a tool calls the Trainer's keys, and what it takes where they are left out."""

    epochs: str = "num_train_epochs"
    batch: str = "per_device_train_batch_size"
    judged: str = "per_device_eval_batch_size"
    scheduler: str = "lr_scheduler_type"
    optimizer: str = "optim"
    usual: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that differ from the Trainer's own."""


USUAL: Mapping[str, Any] = {"epochs": 3.0, "batch": 8, "accumulation": 1, "learning_rate": 5e-5, "scheduler": "linear"}
"""The Trainer's own defaults."""


@dataclass
class Draft:
    """A recipe in the making."""

    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    adapter: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    generated: dict[str, Any] = field(default_factory=dict)
    """A schedule, in place of a list of stages."""
    training: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0
    per_device_batch_size: int | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    remarks: dict[str, str] = field(default_factory=dict)
    """Key of the recipe -> the comment above it."""

    def unfreeze(self, *patterns: str) -> None:
        """Open these in the first stage, and nothing beside them."""
        self.freeze = self.freeze or [EVERYTHING]
        self.stages[0]["unfreeze"] = fold([*self.stages[0].get("unfreeze", ()), *patterns])

    def recipe(self) -> dict[str, Any]:
        """The recipe's keys in the order in which they are written."""
        return {
            "model": _short(self.model, "path"),
            "task": _short(self.task, "type"),
            "data": _short(self.data, "path"),
            "freeze": self.freeze[0] if len(self.freeze) == 1 else self.freeze,
            "adapters": [self.adapter] if self.adapter else [],
            "stages": self.generated or [_one_pattern(stage) for stage in self.stages],
            "training": self.training,
            "batch_size": self.batch_size or None,
            "per_device_batch_size": self.per_device_batch_size,
            "evaluation": self.evaluation,
            "seed": self.seed,
        }


class Tool(ABC):
    """Reads the configs of one tool."""

    name: ClassVar[str]
    answers: ClassVar[Mapping[str, str]] = {}
    """Keys that have no counterpart -> what becomes of them."""
    silent: ClassVar[frozenset[str]] = frozenset()
    """Keys that say nothing about training."""

    @abstractmethod
    def knows(self, config: Config) -> bool:
        """Whether a config looks like one of this tool's."""

    @abstractmethod
    def read(self, config: Config, given: Given) -> Draft:
        """The recipe that does the same. Raises `RecipeError` where there is none."""


def trainer(config: Config, draft: Draft, words: Words, given: Given) -> None:
    """Read the keys that a tool shares with transformers' Trainer into a recipe of one stage."""
    usual = {**USUAL, **words.usual}
    for key in (*SHARES, *COUNTS):
        value = config.number(key, usual.get(key))
        if key in COUNTS and value is not None and (value < 1 or value != int(value)):
            config.note(key, "a share of the run has no counterpart here; write a number of steps")
        elif value is not None:
            draft.training[key] = int(value) if key in COUNTS else float(value)
    _schedule(config, draft, words, usual)
    stage = _length(config, words, usual)
    if not config.flag("load_best_model_at_end"):
        stage["restore_best"] = False
    draft.stages = [stage]
    _batch(config, draft, words, usual, given)
    _evaluation(config, draft)
    draft.seed = config.number("seed", 42)


def _schedule(config: Config, draft: Draft, words: Words, usual: Mapping[str, Any]) -> None:
    ratio, steps = config.number("warmup_ratio"), config.number("warmup_steps")
    if warmup := steps or ratio or usual.get("warmup"):
        draft.training["warmup_steps"] = warmup
    scheduler = str(config.take(words.scheduler, usual["scheduler"]))
    if scheduler in get_args(SchedulerName):
        draft.training["lr_scheduler_type"] = scheduler
    else:
        config.note(words.scheduler, f"there is no `{scheduler}` here; the rate falls linearly")
    arguments = config.take("lr_scheduler_kwargs")
    if arguments := json.loads(arguments) if isinstance(arguments, str) else arguments:
        draft.training["lr_scheduler_kwargs"] = arguments
    optimizer = str(config.take(words.optimizer, "adamw_torch_fused"))
    optimizer = OPTIMIZERS.get(optimizer, optimizer)
    if optimizer not in get_args(OptimizerName):
        config.note(words.optimizer, f"there is no `{optimizer}` here; AdamW is taken")
    elif optimizer != "adamw_torch_fused":
        draft.training["optim"] = optimizer


def _length(config: Config, words: Words, usual: Mapping[str, Any]) -> dict[str, Any]:
    epochs, steps = config.number(words.epochs, usual["epochs"]), config.number("max_steps", -1)
    return {"name": "train", "steps": int(steps)} if steps > 0 else {"name": "train", "epochs": epochs}


def _batch(config: Config, draft: Draft, words: Words, usual: Mapping[str, Any], given: Given) -> None:
    """The batch of all devices together, which is what a recipe has."""
    micro = int(config.number(words.batch, usual["batch"]))
    times = int(config.number("gradient_accumulation_steps", 0) or 0)
    times = times or usual["accumulation"] or max(1, -(-16 // (micro * given.devices)))
    draft.batch_size = micro * times * given.devices
    draft.per_device_batch_size = micro if times > 1 else None
    many = f"{given.devices} devices" if given.devices > 1 else "one device (`--devices` says how many there were)"
    often = f", {times} times before a step" if times > 1 else ""
    draft.remarks["batch_size"] = f"{micro} at a time{often}, on {many}."
    judged = config.number(words.judged)
    if judged and judged != micro:
        draft.evaluation["batch_size"] = int(judged)


def _evaluation(config: Config, draft: Draft) -> None:
    strategy = config.take("eval_strategy") or config.take("evaluation_strategy")
    steps = config.number("eval_steps")
    if isinstance(steps, float) and not steps.is_integer():
        config.note("eval_steps", "a share of the run has no counterpart here; it is judged once an epoch")
    elif steps and strategy in (None, "steps"):
        draft.evaluation["eval_steps"] = int(steps)


def held_out(draft: Draft, config: Config, key: str, rows: float | None) -> None:
    """Which rows judge: a share of them, a number of them, or as the recipe does it by itself."""
    splits = draft.data.setdefault("splits", {})
    if rows and rows < 1:
        splits["validation"] = float(rows)
    elif rows:
        split = str(splits.get("train", "train"))
        if "[" in split:
            config.note(key, "rows are counted already; a tenth of them judges")
        else:
            splits |= {"train": f"{split}[:-{int(rows)}]", "validation": f"{split}[-{int(rows)}:]"}
            config.note(key, "the last rows judge, not some at random")
    elif not splits.get("validation"):
        draft.remarks["data"] = "Nothing was held out before; here the data's own validation split judges, or a tenth."


def data_at(path: str) -> dict[str, Any]:
    """`data` of a file, by the builder that reads it, or of a data set by its name."""
    builder = FILES.get(Path(path).suffix.lower())
    return {"path": builder, "data_files": {"train": path}} if builder else {"path": path}


def half(config: Config, draft: Draft, *flags: str) -> None:
    """Weights that are held in half precision there are here as well; what trains is always float32 here."""
    for flag in [flag for flag in flags if config.flag(flag)]:
        draft.model["dtype"] = "bfloat16"
        config.note(flag, "frozen weights are held in bfloat16; mixed precision is for `accelerate config` to say")


def attention(config: Config, draft: Draft, asked: str) -> None:
    """How attention is computed, where transformers has it by that name."""
    names = {"flash_attn": "flash_attention_2", "fa2": "flash_attention_2", "flash": "flash_attention_2"}
    name = names.get(asked, asked)
    if name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
        draft.model["attn_implementation"] = name


def adapt(draft: Draft, fields: Mapping[str, Any], targets: list[str], whole: list[str]) -> None:
    """LoRA on the linear layers of the blocks, or on `targets` alone; `whole` modules train their own weights.

    What PEFT adapts by the end of its name is adapted here by the same word.
    """
    draft.adapter = {"type": "lora", **({"target_modules": targets} if targets else {}), **fields}
    outside = [target for target in targets if target in ("lm_head", "embed_tokens", "score", "classifier")]
    draft.unfreeze("@blocks", *outside, *whole)


def override(draft: Draft, given: Given) -> None:
    """What the command line says has the last word."""
    if given.model:
        draft.model["path"] = given.model
    if given.task:
        draft.task = {"type": given.task}
    if given.data:
        draft.data = data_at(given.data)


def _short(mapping: dict[str, Any], key: str) -> Any:
    said = {name: value for name, value in mapping.items() if value not in (None, {}, "")}
    return said[key] if set(said) == {key} else said


def _one_pattern(stage: dict[str, Any]) -> dict[str, Any]:
    """A list of one pattern as the pattern; keys in the order in which a stage is read."""
    order = ["name", "freeze", "unfreeze", "epochs", "steps", "learning_rate"]
    keys = sorted(stage, key=lambda key: order.index(key) if key in order else len(order))
    said = {key: stage[key] for key in keys if stage[key] != []}
    for key in ("freeze", "unfreeze"):
        if isinstance(said.get(key), list) and len(said[key]) == 1:
            said[key] = said[key][0]
    return said
