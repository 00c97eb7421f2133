"""What a run says of itself: one event is one line of `metrics.jsonl`. Nothing here decides or measures anything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    def json(self) -> dict[str, Any]:
        """The event as one JSON object; a number that is not finite is None."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        return {"event": name, **_finite(asdict(self))}


@dataclass(frozen=True)
class Started(Event):
    """The run begins or goes on."""

    recipe: str
    fingerprint: str
    """The plan's."""
    processes: int
    device: str
    batch: str
    """How a step's examples are spread over devices and micro-batches, and why."""
    base_bytes: int = 0
    """Memory of the device, or of the process on a CPU, before the model was loaded."""


@dataclass(frozen=True)
class Note(Event):
    """Something the user should know."""

    sentence: str


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins: everything is frozen, opened and prepared as it says."""

    stage: str
    size: int
    """Number of elements that train."""
    steps: int
    carried: int
    """Parameters whose moments came along from the stage before."""
    frozen: str = ""
    """What becomes of the frozen prefix: replayed from the cache, or computed, and why."""
    replayed: float = 0.0
    """Share of a forward pass that is replayed from the cache and not computed."""
    step: int = 0
    """Steps of it that were done before: more than 0 where a run goes on in the middle of a stage."""


@dataclass(frozen=True)
class Step(Event):
    """The training since the last record of it."""

    stage: str
    step: int
    """Optimizer steps done in this stage."""
    steps: int
    loss: float
    """Mean over the units (examples, live tokens) of the steps since the last record."""
    gradient_norm: float
    """Of the last step, before clipping."""
    rates: tuple[float, ...]
    """Learning rate of each group."""
    seconds: float
    """Wall time of the steps since the last record, evaluations left out."""


@dataclass(frozen=True)
class Evaluated(Event):
    """The model was judged."""

    stage: str
    step: int
    split: str
    metrics: dict[str, float]
    best: bool = False
    """Whether it is the best of its stage so far."""
    seconds: float = 0.0


@dataclass(frozen=True)
class StageEnded(Event):
    """A stage is over."""

    stage: str
    step: int
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the weights that go on: the best, or the last."""
    seconds: float = 0.0
    peak_bytes: int = 0
    """Most memory of the device, or of the process on a CPU, during the stage."""
    moved: dict[str, float] = field(default_factory=dict)
    """Layer -> norm of its change since the run began, as a share of the norm it had."""


@dataclass(frozen=True)
class Proved(Event):
    """What moved and what stood still, tensor by tensor, from the first step to the saved file."""

    moved: int
    """Tensors that trained, each different from its start and in the saved model as it ended."""
    still: int
    """Frozen tensors and buffers, each bit-equal to its start."""
    unmoved: tuple[str, ...] = ()
    """Tensors that trained and yet have the bits they started with: the data never gave them a gradient."""


@dataclass(frozen=True)
class Finished(Event):
    """The run is over and its model saved."""

    model: str
    seconds: float


def write(path: Path, event: Event, **more: Any) -> None:
    """Append an event to a file of records."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event.json() | more, allow_nan=False) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, oldest first; a last line that a kill has cut short is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
