"""How a step's examples are spread over devices and micro-batches. Pure: the same examples meet in the same
micro-batches on any number of devices, as long as the micro-batch is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class MicroBatch:
    """What one device takes in one forward pass."""

    number: int
    """Its number within the step, over all devices."""
    indices: tuple[int, ...]
    """Examples."""
    counts: bool
    """False for a repeat that only keeps a device in step with the others: its loss weighs nothing."""


@dataclass(frozen=True)
class Batching:
    """The micro-batches of every step."""

    batch_size: int
    """Examples per optimizer step, over all devices."""
    micro: int
    """Most examples a device takes at once."""
    processes: int

    @property
    def accumulation(self) -> int:
        """Forward passes that each device makes for one optimizer step."""
        return ceil(self.batch_size / (self.micro * self.processes))

    @property
    def reason(self) -> str:
        """The arithmetic in words."""
        each = f"{self.batch_size} examples a step"
        return f"{each} = {self.processes} x {self.accumulation} x {self.micro} (devices x accumulation x micro-batch)"

    def halved(self) -> Batching:
        """The same batch in micro-batches of half the size."""
        return Batching(self.batch_size, max(1, self.micro // 2), self.processes)

    def limited(self, micro: int) -> Batching:
        """The same batch in micro-batches no larger than those that a run began with: dropout is drawn by them."""
        return Batching(self.batch_size, min(self.micro, micro), self.processes)

    def lonely(self, count: int) -> bool:
        """Whether some device takes a single example in a step of so many."""
        shares = (self.share(range(count), rank) for rank in range(self.processes))
        return any(len(micro.indices) == 1 for share in shares for micro in share)

    def share(self, indices: Sequence[int], rank: int) -> list[MicroBatch]:
        """The micro-batches of device `rank` for a step on these examples; every device gets as many."""
        share = []
        for turn in range(self.accumulation):
            number = turn * self.processes + rank
            chunk = tuple(indices[number * self.micro : (number + 1) * self.micro])
            share.append(MicroBatch(number, chunk or tuple(indices[:1]), bool(chunk)))
        return share


def batching(batch_size: int, per_device: int | None, processes: int) -> Batching:
    """The batching of a recipe on a number of devices."""
    even = ceil(batch_size / processes)
    return Batching(batch_size, min(per_device or even, even), processes)
