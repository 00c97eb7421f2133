"""Chain-thaw (Felbo et al. 2017, DeepMoji, https://arxiv.org/abs/1708.00524): one layer at a time, then all."""

from __future__ import annotations

from typing import Literal

from engine.schedules.base import Schedule, StageEntry


class ChainThaw(Schedule):
    """Train the head, then each layer alone from the first to the last, then everything together.

    Chain-thaw, Felbo et al. 2017.
    """

    type: Literal["chain_thaw"]

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        stages = [self.stage("head", learning_rate=learning_rate)]
        before = "@head"
        layers = [("embeddings", "@embeddings"), *((f"block-{i}", f"@blocks[{i}]") for i in range(blocks))]
        for name, selector in layers:
            stages.append(self.stage(name, freeze=(before,), unfreeze=(selector,), learning_rate=learning_rate))
            before = selector
        everything = ("@embeddings", "@blocks", "@head")
        return (*stages, self.stage("all", unfreeze=everything, learning_rate=learning_rate))
