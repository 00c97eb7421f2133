"""A window of open blocks that slides over the model: what it leaves behind freezes again."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.schedules.base import Schedule, StageEntry, moved_to


class Sliding(Schedule):
    """The head first, then a window of neighbouring blocks that moves down (or up) and freezes what it leaves.

    Never more than one window's gradients and moments are held at a time. Layer by layer, as chain-thaw goes (Felbo et
    al. 2017), but with neighbours that train together. Recipe: `freeze: ["@embeddings", "@blocks"]`.
    """

    type: Literal["sliding"]
    blocks_per_stage: Annotated[int, Field(ge=1)] = 2
    """Blocks in the window."""
    stride: Annotated[int, Field(ge=1)] = 1
    """Blocks that it moves by; smaller than the window, neighbouring stages share some."""
    direction: Literal["down", "up"] = "down"
    """`down` goes from the last block to the first, `up` from the first to the last."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        size = self.blocks_per_stage
        self.at_least(size, blocks)
        bottoms = [*range(0, blocks - size, self.stride), blocks - size]
        stages, last = [self.stage("head", learning_rate=learning_rate)], frozenset[int]()
        for bottom in bottoms if self.direction == "up" else [blocks - size - bottom for bottom in bottoms]:
            window = frozenset(range(bottom, bottom + size))
            name = f"blocks-{bottom}-{bottom + size - 1}" if size > 1 else f"block-{bottom}"
            stages.append(self.stage(name, learning_rate=learning_rate, **moved_to(window, last)))
            last = window
        return tuple(stages)
