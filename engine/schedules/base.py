"""A stage as a recipe writes it, and the base of everything that generates a list of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from engine.adapters import Adapter
from engine.part import Part, Patterns

SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
"""The names of `transformers.SchedulerType` whose rate is a function of the step and nothing else."""

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Lasting(Part):
    """What lasts for a number of epochs or of steps."""

    epochs: Rate | None = None
    """Passes over the training data; give this or `steps`."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps; give this or `epochs`."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` and `steps`")
        return self


class EarlyStopping(Part):
    """End a stage when its metric stops getting better."""

    metric: str | None = None
    """The metric to watch; the recipe's `evaluation.metric` if left out."""
    patience: Annotated[int, Field(ge=1)] = 1
    """Evaluations in a row without a gain before the stage ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A gain smaller than this is none."""


class StageEntry(Lasting):
    """One stage: what changes hands at its start, how long it lasts, at which rate it trains."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """How overrides, reports and checkpoints call it."""
    freeze: Patterns = ()
    """Patterns to freeze, on top of the stage before."""
    unfreeze: Patterns = ()
    """Patterns to unfreeze, after `freeze`: the last word wins."""
    learning_rate: Rate | dict[str, Rate] | None = None
    """One rate, or a mapping from pattern to rate: the last match wins, `training.learning_rate` is the rest."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """In place of `training.weight_decay`."""
    warmup_steps: Annotated[float, Field(ge=0)] | None = None
    """In place of `training.warmup_steps`; below 1 a share of the stage."""
    lr_scheduler_type: SchedulerName | None = None
    """In place of `training.lr_scheduler_type`."""
    layer_decay: Share | None = None
    """In place of `training.layer_decay`."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters that this stage attaches, beside those of the recipe."""
    early_stopping: EarlyStopping | None = None
    """End the stage early when a metric stops getting better."""
    restore_best: bool = True
    """Whether the best weights of the stage carry over to the next, rather than the last."""
    moments: Literal["keep", "reset", "drop"] = "keep"
    """`keep` carries AdamW's moments of what trained before into this stage, by name; `reset` starts this stage without
    any; `drop` keeps those of what goes on training and forgets what freezes, for good."""
    then: Literal["merge", "keep", "drop"] = "keep"
    """What becomes of the adapters at the end of the stage."""


class Schedule(Lasting, ABC):
    """Generates the list of stages, each `epochs` or `steps` long; pure: it sees no weights and no data."""

    @abstractmethod
    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        """The stages for a model of `blocks` blocks whose recipe trains at `learning_rate`.

        Raises `ValueError`, in the user's words, where there are fewer blocks than it takes.
        """

    def stage(self, name: str, **fields: Any) -> StageEntry:
        """A stage as long as the schedule says."""
        return StageEntry(name=name, **{"epochs": self.epochs, "steps": self.steps} | fields)

    def at_least(self, needed: int, blocks: int) -> None:
        """Raise `ValueError` where a model has fewer blocks than this schedule opens at a time."""
        if blocks < needed:
            raise ValueError(f"it opens {needed} blocks at a time, and this model has {blocks}")


def moved_to(blocks: frozenset[int], before: frozenset[int]) -> dict[str, tuple[str, ...]]:
    """What a stage that opens `blocks` freezes and unfreezes after one that had `before` open: the changes alone."""
    return {
        "freeze": tuple(f"@blocks[{block}]" for block in sorted(before - blocks)),
        "unfreeze": tuple(f"@blocks[{block}]" for block in sorted(blocks - before)),
    }
