"""Block-coordinate descent with Adam (BAdam, Luo et al. 2024, https://arxiv.org/abs/2404.02827)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.randomness import stable_seed
from engine.schedules.base import Schedule, Share, StageEntry, moved_to


class BlockCoordinate(Schedule):
    """Each block trains alone for a while, in one cycle after another, with moments that last as long as its turn.

    BAdam, Luo et al. 2024; `steps` is the paper's K. What the recipe leaves open, such as the head, trains throughout.
    Recipe: `freeze: ["@embeddings", "@blocks"]`.
    """

    type: Literal["block_coordinate"]
    cycles: Annotated[int, Field(ge=1)] = 1
    """How often every block has its turn."""
    order: Literal["random", "ascending", "descending"] = "random"
    """Order of the blocks; `random` draws it anew for each cycle."""
    learning_rate_decay: Share = 1.0
    """Each cycle's rate as a share of the cycle before's."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the random orders."""

    def entries(self, blocks: int, learning_rate: float) -> tuple[StageEntry, ...]:
        self.at_least(1, blocks)
        stages, last = [], frozenset[int]()
        for cycle in range(self.cycles):
            rate = learning_rate * self.learning_rate_decay**cycle
            for block in self._ordered(blocks, cycle):
                name, turn = f"cycle-{cycle + 1}-block-{block}", frozenset((block,))
                stages.append(self.stage(name, learning_rate=rate, moments="drop", **moved_to(turn, last)))
                last = turn
        return tuple(stages)

    def _ordered(self, blocks: int, cycle: int) -> list[int]:
        if self.order == "random":
            return sorted(range(blocks), key=lambda block: stable_seed(self.seed, "block_coordinate", cycle, block))
        return sorted(range(blocks), reverse=self.order == "descending")
