"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): biases and the head, nothing else."""

from __future__ import annotations

from typing import Literal

from engine.part import Patterns
from engine.schedules.base import Schedule, StageEntry


class BitFit(Schedule):
    """Train the biases and whatever the recipe leaves open, such as the head: about 0.1 % of a model's weights.

    BitFit, Ben Zaken et al. 2022. Its rates are ten times those of full fine-tuning (1e-4 to 1e-3). Models without
    biases, such as Llama, have nothing to train by it. Recipe: `freeze: ["@embeddings", "@blocks"]`.
    """

    type: Literal["bitfit"]
    unfreeze: Patterns = ("@biases",)
    """What opens; `["@biases", "@norms"]` adds the scales of the norms."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        return (self.stage("biases", unfreeze=self.unfreeze, learning_rate=learning_rate),)
