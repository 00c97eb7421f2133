"""Surgical fine-tuning (Lee et al. 2023, https://arxiv.org/abs/2210.11466): one set of blocks and nothing else."""

from __future__ import annotations

from typing import Literal

from engine.part import Patterns
from engine.schedules.base import Rate, Schedule, StageEntry


class Surgical(Schedule):
    """Train one set of blocks, named by what has changed about the data, and leave all others as they are.

    Surgical fine-tuning, Lee et al. 2023: the first blocks where inputs look different (noise, typing errors), the
    middle ones where features mean something else, the last ones where labels do. A head that is open trains along.
    """

    type: Literal["surgical"]
    unfreeze: Patterns
    """The blocks to train, such as `"@blocks[:2]"`."""
    head_epochs: Rate | None = None
    """Passes over the training data with only the head open before that, for a head that starts at random."""
    head_learning_rate: Rate = 1e-3
    """Rate of the head alone."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        blocks_alone = self.stage("surgical", unfreeze=self.unfreeze, learning_rate=learning_rate)
        if self.head_epochs is None:
            return (blocks_alone,)
        head = StageEntry(name="head", epochs=self.head_epochs, learning_rate=self.head_learning_rate)
        return (head, blocks_alone)
