"""The loop: stages and their steps, as a generator of events. It decides when to judge, what is best and when to stop.

What holds at every yield: the model obeys its stage, the optimizer holds exactly what trains, and everything needed to
go on from here is in the learner and in the position. Who reads the events may print, record or stop; the loop never
prints and never writes but through its folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.errors import RunError
from engine.folder import RunFolder
from engine.learner import Learner
from engine.metrics import greater_is_better
from engine.plan import Plan, Stage
from engine.proof import compare, digests
from engine.records import Evaluated, Event, Finished, Note, Proved, StageEnded, StageStarted, Step


@dataclass
class Best:
    """The best evaluation of a stage so far, and how long nothing has been better."""

    metric: str
    min_delta: float = 0.0
    value: float | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    """Evaluations in a row without a gain."""

    def beats(self, value: float) -> bool:
        """Whether a value of the metric is a gain."""
        if self.value is None:
            return True
        gain = value - self.value if greater_is_better(self.metric) else self.value - value
        return gain > self.min_delta


def train(learner: Learner, plan: Plan, folder: RunFolder) -> Iterator[Event]:
    """Run every stage of a plan, judge the result on the test split, save it and prove what was done."""
    began = time.perf_counter()
    before = digests(learner.model)
    for stage in plan.stages:
        yield from _stage(learner, stage)
    if learner.data.test is not None:
        yield _judged(learner, plan.stages[-1], plan.stages[-1].steps, "test")
    learner.detach("merge")
    model = folder.save_model(learner)
    if learner.accelerator.is_main_process:
        yield from _proved(learner, before, folder)
    yield Finished(model=str(model), seconds=time.perf_counter() - began)


def _stage(learner: Learner, stage: Stage) -> Iterator[Event]:
    began = time.perf_counter()
    carried = learner.enter(stage)
    yield StageStarted(stage.name, stage.size, stage.steps, carried)
    best = Best(_deciding_metric(learner, stage), stage.early_stopping.min_delta if stage.early_stopping else 0.0)
    step, reason = 0, f"{stage.steps} steps done"
    clock = time.perf_counter()
    for step in range(1, stage.steps + 1):
        norm = learner.step(step - 1)
        due = _evaluation_due(learner, stage, step)
        if step % learner.recipe.training.logging_steps == 0 or due:
            yield _taken(learner, stage, step, norm, time.perf_counter() - clock)
            clock = time.perf_counter()
        if due:
            yield _weighed(learner, stage, best, _judged(learner, stage, step, "validation"))
            clock = time.perf_counter()
            if stage.early_stopping and best.stale >= stage.early_stopping.patience:
                reason = f"no gain in {best.metric} for {best.stale} evaluations"
                break
    if best.weights and stage.restore_best:
        learner.restore(best.weights)
    learner.leave()
    seconds = time.perf_counter() - began
    yield StageEnded(stage.name, step, reason, best.metrics, seconds, _peak_bytes(learner))


def _deciding_metric(learner: Learner, stage: Stage) -> str:
    own = stage.early_stopping.metric if stage.early_stopping else None
    return own or learner.recipe.evaluation.metric or (learner.metrics or ("loss",))[0]


def _evaluation_due(learner: Learner, stage: Stage, step: int) -> bool:
    if learner.data.validation is None:
        return False
    every = learner.recipe.evaluation.eval_steps or stage.steps_per_epoch
    return step % every == 0 or step == stage.steps


def _taken(learner: Learner, stage: Stage, step: int, norm: float, seconds: float) -> Step:
    rates = tuple(group["lr"] for group in learner.optimizer.param_groups)
    return Step(stage.name, step, stage.steps, learner.taken_loss(), norm, rates, seconds)


def _judged(learner: Learner, stage: Stage, step: int, split: str) -> Evaluated:
    began = time.perf_counter()
    metrics = learner.evaluate(getattr(learner.data, split))
    return Evaluated(stage.name, step, split, metrics, seconds=time.perf_counter() - began)


def _weighed(learner: Learner, stage: Stage, best: Best, judged: Evaluated) -> Evaluated:
    """Whether an evaluation is the best of its stage; if so its weights are kept.

    Raises `RunError` where the metric that decides is missing or not a number: a best of nothing must not carry over.
    """
    value = judged.metrics.get(best.metric)
    if value is None or not math.isfinite(value):
        said = "is not computed" if value is None else f"is {value}"
        place = f"stage `{stage.name}`, step {judged.step}"
        raise RunError(f"{place}: `{best.metric}` {said}, so nothing can be best; name another metric, or more rows")
    if not best.beats(value):
        best.stale += 1
        return judged
    best.value, best.metrics, best.stale = value, judged.metrics, 0
    if stage.restore_best:
        best.weights = learner.snapshot()
    return Evaluated(judged.stage, judged.step, judged.split, judged.metrics, best=True, seconds=judged.seconds)


def _proved(learner: Learner, before: dict[str, str], folder: RunFolder) -> Iterator[Event]:
    proved: Proved = compare(before, digests(learner.model), learner.moved, learner.trained, folder.model)
    yield proved
    if proved.unmoved:
        names = ", ".join(proved.unmoved[:3])
        yield Note(f"{len(proved.unmoved)} tensors trained without ever getting a gradient: {names}")


def _peak_bytes(learner: Learner) -> int:
    import resource

    import torch

    if learner.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
