"""How the cost of a partly frozen training grows: with layers, tokens, examples, epochs and stages, ours and the floor.

    python scripts/bench_scale.py [--quick] [--plot docs/scale]

Narrow BERTs that start at random, on random texts. FLOPs are counted as they are computed, in the search for the frost
line, its check, capture and every step; the floor is one forward pass of the frozen part and, for each step, forward
and backward of what trains, which nothing that trains the same can go below. CPU time is that of one thread, of a run
without the count. `off` is the same recipe with `cache: off`. Nothing is judged, so nothing is gained by evaluations.
torch knows no count for its fused attention on CPUs, which is what runs without dropout: in what is frozen, attention
counts as nothing, in all three columns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset

from engine import freezing
from engine.data import Encoded, Split
from engine.frost.prefix import Cache
from engine.frost.tracing import Flops
from engine.learner import Learner
from engine.models import draft
from engine.recipe import Recipe
from engine.rows.batches import batching
from engine.tasks import Facts

BATCH, WIDTH, LABELS = 16, 64, 6
AXES = {
    "layers": (6, 12, 24, 48),
    "tokens": (16, 32, 64, 128),
    "examples": (64, 128, 256, 512),
    "epochs": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4),
}


@dataclass(frozen=True)
class Point:
    """A size of work. Stage 1 trains the top two layers, each later one another layer below."""

    layers: int = 12
    tokens: int = 32
    examples: int = 128
    epochs: int = 3
    stages: int = 1


@dataclass(frozen=True)
class Cost:
    """What a point takes."""

    flops: dict[str, float]
    """Of `off`, `ours` and the `floor`."""
    seconds: dict[str, float]
    """CPU seconds of `off` and `ours`."""


def bert(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH, "vocab_size": 500}
    kind = {"num_labels": LABELS, "problem_type": "single_label_classification"}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(num_hidden_layers=layers, **sizes, **kind)
    )


def texts(point: Point) -> Dataset:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 500, size=(point.examples, point.tokens)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": draw.integers(0, LABELS, size=point.examples).tolist()})


def stacked(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


def recipe(point: Point) -> Recipe:
    opened = [[f"layer.{point.layers - 1}", f"layer.{point.layers - 2}"]]
    opened += [[f"layer.{point.layers - 2 - later}"] for later in range(1, point.stages)]
    stages = [{"name": f"s{n}", "epochs": point.epochs, "unfreeze": tuple(names)} for n, names in enumerate(opened)]
    return Recipe.model_validate(
        {
            "model": "none",
            "task": "text-classification",
            "data": "none",
            "freeze": ("embeddings", "encoder"),
            "stages": tuple(stages),
            "batch_size": BATCH,
        }
    )


class Work:
    """A run of all stages without a run folder: enter, step, leave."""

    def __init__(self, point: Point, cache: Path | None):
        wanted = recipe(point)
        with torch.device("meta"):
            self.plan, _ = draft(wanted, bert(point.layers), point.examples)
        facts = Facts(tuple(map(str, range(LABELS))), "single_label_classification")
        type(wanted.task).collate = lambda _task, _processor: stacked
        data, spread = Encoded(Split(texts(point)), None, None, ()), batching(BATCH, None, 1)
        kept = Cache(cache) if cache else None
        self.learner = Learner(wanted, bert(point.layers), None, data, facts, Accelerator(cpu=True), spread, kept)
        self.saved: list[float] = []
        """Share of a forward pass that lies below the frost line, by stage."""

    def __call__(self) -> None:
        for stage in self.plan.stages:
            self.learner.enter(stage, ahead=self.plan.stages[stage.index + 1 :])
            self.saved.append(self.learner.shortcut.line.saved if self.learner.shortcut.line else 0.0)
            for step in range(stage.steps):
                self.learner.step(step)
            self.learner.leave()


def counted(work: Any) -> float:
    with Flops() as flops:
        work()
    return float(flops.total)


def seconds(work: Work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def floor(point: Point, work: Work) -> float:
    """FLOPs that any training of the same must spend, from one row of each stage: all rows are alike."""
    model, batch = bert(point.layers).eval(), stacked([texts(point)[0]])
    forward = counted(lambda: model(**batch))
    per_row = forward * max(work.saved)
    for stage, saved in zip(work.plan.stages, work.saved, strict=True):
        freezing.obey(model, stage.trainable)
        freezing.train_mode(model)
        step = counted(lambda: model(**batch).loss.backward())
        per_row += (step - saved * forward) * point.epochs
    return per_row * point.examples


def cost(point: Point) -> Cost:
    """A point measured: our run counted and timed, with and without the cache."""
    flops, took = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("off", "ours"):
            work = Work(point, Path(folder) / "counted" if way == "ours" else None)
            flops[way] = counted(work)
            took[way] = seconds(Work(point, Path(folder) / "timed" if way == "ours" else None))
    return Cost(flops | {"floor": floor(point, work)}, took)


def line(axis: str, value: int, found: Cost) -> str:
    off, ours, least = (found.flops[way] / 1e9 for way in ("off", "ours", "floor"))
    share, times = ours / least, found.seconds["off"] / found.seconds["ours"]
    return (
        f"{axis:9}{value:>5}{off:>10.1f}{ours:>9.1f}{least:>9.1f}{off / ours:>9.2f}x{share:>8.2f}x"
        f"{found.seconds['off']:>9.1f} s{found.seconds['ours']:>7.1f} s{times:>8.2f}x"
    )


def plot(found: dict[str, dict[int, Cost]], path: Path) -> None:
    """One panel an axis, logarithmic both ways: FLOPs of `cache: off`, ours, and the floor."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(3 * len(found), 3), sharey=True, layout="constrained")
    marks = {"off": ("o--", "#999999"), "ours": ("o-", "#0b7285"), "floor": (":", "black")}
    labels = {"off": "cache off", "ours": "Frostline", "floor": "floor"}
    for panel, (axis, costs) in zip(np.atleast_1d(panels), found.items(), strict=True):
        for way, (mark, colour) in marks.items():
            spent = [each.flops[way] / 1e9 for each in costs.values()]
            panel.loglog(list(costs), spent, mark, color=colour, label=labels[way])
        panel.set_xticks(list(costs), list(map(str, costs)))
        panel.minorticks_off()
        panel.set_xlabel(axis)
    np.atleast_1d(panels)[0].set_ylabel("GFLOP of a run")
    np.atleast_1d(panels)[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--quick", action="store_true", help="the two smallest values of each axis")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="without its ending: a PNG and an SVG are written")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("                GFLOP off     ours    floor  off/ours  ours/floor   CPU off    ours  off/ours", flush=True)
    found: dict[str, dict[int, Cost]] = {}
    for axis in asked.axes or AXES:
        found[axis] = {}
        for value in AXES[axis][: 2 if asked.quick else None]:
            found[axis][value] = cost(replace(Point(), **{axis: value}))
            print(line(axis, value, found[axis][value]), flush=True)
    if asked.plot:
        plot(found, asked.plot)


if __name__ == "__main__":
    main()
