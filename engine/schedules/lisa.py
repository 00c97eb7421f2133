"""LISA (Pan et al. 2024, https://arxiv.org/abs/2403.17919): a few blocks drawn anew every so many steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.randomness import stable_seed
from engine.schedules.base import Schedule, Share, StageEntry, moved_to


class LISA(Schedule):
    """In each of many short stages a few blocks, drawn at random, train; all others freeze and are forgotten.

    LISA, Pan et al. 2024. What the recipe leaves open trains throughout: the paper's embeddings and head, by
    `freeze: "@blocks"`. Its rate is constant within a stage: `training.lr_scheduler_type: constant`.
    """

    type: Literal["lisa"]
    stages: Annotated[int, Field(ge=1)] = 10
    """How many times blocks are drawn."""
    blocks_per_stage: Annotated[int, Field(ge=1)] = 2
    """Blocks that train at a time (the paper's gamma)."""
    learning_rate_decay: Share = 1.0
    """Each stage's rate as a share of the stage before's."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which blocks are drawn."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        self.at_least(self.blocks_per_stage, blocks)
        stages, last = [], frozenset[int]()
        for number in range(self.stages):
            order = sorted(range(blocks), key=lambda block: stable_seed(self.seed, "lisa", number, block))
            drawn = frozenset(order[: self.blocks_per_stage])
            rate = learning_rate * self.learning_rate_decay**number
            name = f"draw-{number + 1}"
            stages.append(self.stage(name, learning_rate=rate, moments="drop", **moved_to(drawn, last)))
            last = drawn
        return tuple(stages)
