"""Gradual unfreezing (Howard & Ruder 2018, ULMFiT, https://arxiv.org/abs/1801.06146): head first, then downwards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.schedules.base import Schedule, Share, StageEntry


class Gradual(Schedule):
    """Head first, then the blocks from the last to the first, then the embeddings; what has opened stays open.

    ULMFiT, Howard & Ruder 2018. With `training.layer_decay: 0.385` its discriminative rates (1 / 2.6) come along.
    """

    type: Literal["gradual"]
    blocks_per_stage: Annotated[int, Field(ge=1)] = 1
    """Blocks that open in each stage."""
    learning_rate_decay: Share = 1.0
    """Each stage's rate as a share of the stage before's."""
    embeddings: bool = True
    """Whether the last stage opens the embeddings."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        opens = [("head", "")]
        for bottom in range(blocks - self.blocks_per_stage, -self.blocks_per_stage, -self.blocks_per_stage):
            opened = blocks - max(bottom, 0)
            opens.append((f"top-{opened}", f"@blocks[-{opened}:]"))
        if self.embeddings:
            opens.append(("all", "@embeddings"))
        return tuple(
            self.stage(
                name,
                unfreeze=(pattern,) if pattern else (),
                learning_rate=learning_rate * self.learning_rate_decay**stage,
            )
            for stage, (name, pattern) in enumerate(opens)
        )
