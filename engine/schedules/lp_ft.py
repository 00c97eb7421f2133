"""Linear probing, then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054)."""

from __future__ import annotations

from typing import Literal

from engine.part import Patterns
from engine.schedules.base import Rate, Schedule, StageEntry


class LPFT(Schedule):
    """Train the head on frozen features, then everything from there: keeps more of what pretraining knew.

    LP-FT, Kumar et al. 2022. `epochs` or `steps` is the length of the fine-tuning.
    """

    type: Literal["lp_ft"]
    head_epochs: Rate = 1.0
    """Passes over the training data with only the head open."""
    head_learning_rate: Rate = 1e-3
    """Rate of the head alone; the fine-tuning trains at `training.learning_rate`."""
    unfreeze: Patterns = ("@embeddings", "@blocks")
    """What opens after the head."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        return (
            StageEntry(name="head", epochs=self.head_epochs, learning_rate=self.head_learning_rate),
            self.stage("all", unfreeze=self.unfreeze, learning_rate=learning_rate),
        )
