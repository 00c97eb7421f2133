"""What a run says of itself, to trackers as well: TensorBoard, trackio, wandb and whatever else accelerate logs with.

metrics.jsonl stays the record; a tracker gets the same numbers on one axis of steps through all stages. From here it
learns of nothing else than the recipe, which holds no secrets; what it finds out by itself (who is logged in, the
machine's load) its own settings say, and trackio's watch over the machine is off. It decides nothing: one that fails
while a run is under way is told of once and left, and the run goes on. Only the main process logs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import records
from engine.errors import ENVIRONMENT, REFUSED, RunError
from engine.records import Evaluated, Event, Note, StageEnded, StageStarted, Step

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""The trackers that accelerate knows, each with the modules by any of which it is there."""
PROJECT = "frostline"
"""What a tracker files runs under; TensorBoard's files lie in a folder of this name in the run's own."""


def wanted(words: str) -> tuple[str, ...]:
    """The trackers that a list `a,b` names. Raises `RunError` for one that is unknown or not installed."""
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    for name in names:
        if name not in TRACKERS:
            near = get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(TRACKERS)}"
            raise RunError(f"`--log-with {name[:60]}` names no tracker; {hint}", REFUSED)
        if not any(map(find_spec, TRACKERS[name])):
            what = f"`--log-with {name}` needs a package that is not installed"
            raise RunError(f"{what}; run `pip install {TRACKERS[name][0]}`", ENVIRONMENT)
    return names


class Axis:
    """One axis of steps through all stages: where each begins is where the one before has ended."""

    def __init__(self, happened: Iterable[Mapping[str, Any]] = ()):
        self.starts: dict[str, int] = {}
        self.end = 0
        for event in happened:
            if event["event"] == "stage_started":
                self.begin(event["stage"])
            elif event["event"] == "stage_ended":
                self.end = self.starts[event["stage"]] + event["step"]

    def begin(self, stage: str) -> None:
        """A stage begins, or goes on where it was begun before."""
        self.starts.setdefault(stage, self.end)

    def of(self, event: Step | Evaluated | StageEnded) -> int:
        """The place of an event."""
        place = self.starts.get(event.stage, self.end) + event.step
        if isinstance(event, StageEnded):
            self.end = place
        return place


def followed(
    events: Iterable[Event], names: Sequence[str], accelerator: Accelerator, path: Path, name: str, recipe: Any
) -> Iterator[Event]:
    """The events as they come, each of them logged with the trackers named; `path` is the run's folder.

    Raises `RunError` where a tracker can't begin; one that fails later becomes a note among the events.
    """
    if not names or not accelerator.is_main_process:
        yield from events
        return
    happened = list(records.read(path / "metrics.jsonl"))
    axis = Axis(happened)
    with _begun(names, accelerator, path, name, recipe, _resumed(happened, axis)) as trackers:
        for event in events:
            yield event
            if isinstance(event, StageStarted):
                axis.begin(event.stage)
            elif isinstance(event, Step | Evaluated | StageEnded):
                place = axis.of(event)
                yield from filter(None, [_logged(one, trackers, values(event), place) for one in list(trackers)])


def values(event: Step | Evaluated | StageEnded) -> dict[str, float]:
    """What of an event is a number to be drawn, as `group/name`."""
    match event:
        case Step():
            found = {"loss": event.loss, "gradient_norm": event.gradient_norm, "seconds": event.seconds}
            if event.rates:
                found |= {"learning_rate": max(event.rates)}
            if len(set(event.rates)) > 1:
                found |= {"lowest_learning_rate": min(event.rates)}
            group = "train"
        case Evaluated():
            found, group = dict(event.metrics), event.split
        case StageEnded():
            found, group = {"seconds": event.seconds, "peak_bytes": event.peak_bytes}, "stage"
    return {f"{group}/{name}": float(value) for name, value in found.items() if math.isfinite(value)}


def _resumed(happened: Sequence[Mapping[str, Any]], axis: Axis) -> int:
    """The last step on record: what a tracker had of later ones happens again."""
    steps = [axis.starts.get(one["stage"], 0) + one["step"] for one in happened if one["event"] == "step"]
    return max([*steps, axis.end])


@contextlib.contextmanager
def _begun(
    names: Sequence[str], accelerator: Accelerator, path: Path, name: str, recipe: Any, last: int
) -> Iterator[list[Any]]:
    """The trackers, begun; they are ended however the run ends."""
    from accelerate.tracking import filter_trackers

    how: dict[str, dict[str, Any]] = {one: {"name": name} for one in ("trackio", "wandb")}
    how["trackio"] |= {"auto_log_cpu": False, "auto_log_gpu": False}
    how["swanlab"] = {"experiment_name": name}
    how["tensorboard"] = {"purge_step": last + 1} if last else {}
    try:
        accelerator.project_configuration.logging_dir = str(path)
        accelerator.log_with = filter_trackers(list(names), path)  # what `Accelerator(log_with=...)` does
        accelerator.init_trackers(PROJECT, init_kwargs=how)
        for tracker in accelerator.trackers:
            _tell_recipe(tracker, recipe)
    except Exception as error:  # each of them fails in its own way: no account, no server, no disk
        _end(accelerator)
        raise RunError(f"{', '.join(names)} can't begin to log ({_plain(error)})", ENVIRONMENT) from error
    try:
        yield accelerator.trackers
    finally:
        _end(accelerator)


def _tell_recipe(tracker: Any, recipe: Any) -> None:
    """Hand over the recipe, key by key; TensorBoard gets it as a text, for its own way makes a run of it."""
    flat = dict(_flat(recipe))
    if tracker.name == "tensorboard":
        tracker.writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in flat.items()))
    else:
        tracker.store_init_configuration(flat)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _flat(part, f"{key}[{index}]")
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield key, value


def _logged(tracker: Any, trackers: list[Any], found: Mapping[str, float], step: int) -> Note | None:
    """Log values; a tracker that fails is left, and told of."""
    try:
        tracker.log(dict(found), step=step)
    except Exception as error:
        trackers.remove(tracker)
        return Note(f"{tracker.name} failed at step {step} and is left out from here on ({_plain(error)})")
    return None


def _end(accelerator: Accelerator) -> None:
    """End every tracker that has begun; what it can't send any more is in metrics.jsonl."""
    for tracker in accelerator.trackers:
        with contextlib.suppress(Exception):
            tracker.finish()
    accelerator.trackers = []


def _plain(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
