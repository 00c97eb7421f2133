"""The loop: stages and their steps, as a generator of events. It decides when to judge, what is best and when to stop.

What holds at every yield: the model obeys its stage, the optimizer holds exactly what trains, and everything needed to
go on from here is in the learner and in the position. Who reads the events may print, record or stop; the loop never
prints and never writes but through its folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list

from engine import adapters, prompts
from engine.devices import memory
from engine.devices.processes import alike, together
from engine.errors import STOPPED
from engine.judging import judge
from engine.keeping.folder import RunFolder
from engine.keeping.movement import Start
from engine.keeping.position import Best, Position
from engine.keeping.proof import Digests, compare, digests
from engine.learner import Learner
from engine.modelling.quantizing import quantized
from engine.plan import Plan, Stage
from engine.records import Evaluated, Event, Finished, Note, StageEnded, StageStarted, Step
from engine.shipping import apart

Confusion = list[list[int]] | None


class Loop:
    """A run under way."""

    def __init__(
        self, learner: Learner, plan: Plan, folder: RunFolder, position: Position, before: Digests, start: Start
    ):
        self.learner, self.plan, self.folder = learner, plan, folder
        self.position = position
        self.before = before
        """Digests of every tensor before anything trained."""
        self.start = start
        """Where its weights were then."""

    def events(self) -> Iterator[Event]:
        """Run every stage that is not over, judge the result on the test split, save it and prove what was done."""
        began = time.perf_counter()
        while self.position.stage < len(self.plan.stages):
            yield from self._stage(self.plan.stages[self.position.stage])
        if self.learner.data.test is not None:
            last = self.plan.stages[-1]
            judged, confusion = self._judged(last, last.steps, "test")
            yield judged
            self._keep_confusion(judged, confusion)
        model = self.learner.model
        prompted, adapted, quantised = prompts.of(model) is not None, adapters.adapted(model), quantized(model)
        if prompted or adapted:
            write = partial(apart.write, self.learner, self.before.keys())
            together(self.learner.accelerator, lambda: self.folder.save_apart(write))
        self.learner.detach("drop" if quantised else "merge")
        yield from together(self.learner.accelerator, lambda: self.folder.save_model(self.learner, self._proved))
        if prompted or (adapted and quantised):
            what = "virtual tokens" if prompted else "what adapters of quantised weights learned"
            yield Note(f"{what} can't be merged: {self.folder.model} needs {self.folder.adapter} beside it")
        yield Finished(model=str(self.folder.model), seconds=time.perf_counter() - began)

    def _stage(self, stage: Stage) -> Iterator[Event]:
        began, position = time.perf_counter(), self.position
        memory.restart(self.learner.accelerator.device)
        carried = self.learner.enter(stage, position.step > 0, self.plan.stages[stage.index + 1 :])
        yield StageStarted(stage.name, stage.size, stage.steps, carried, *self._prefix(), position.step)
        reason = f"{stage.steps} steps done"
        clock = time.perf_counter()
        while position.step < stage.steps and not self._stale(stage):
            micro = self.learner.batching.micro
            norm = self.learner.step(position.step)
            position.step += 1
            if self.learner.batching.micro < micro:
                what = f"stage `{stage.name}`, step {position.step}: the memory of a device ran out"
                yield Note(f"{what}; from here on {self.learner.batching.reason}")
            due = self._evaluation_due(stage)
            if position.step % self.learner.recipe.training.logging_steps == 0 or due:
                yield self._taken(stage, norm, time.perf_counter() - clock)
                clock = time.perf_counter()
            if due:
                yield self._weighed(stage, *self._judged(stage, position.step, "validation"))
            self._keep(stage, due)
            clock = time.perf_counter() if due else clock
        if self._stale(stage):
            reason = f"no gain in {self._metric(stage)} for {position.best.stale} evaluations"
        yield from self._end(stage, reason, began)

    def _end(self, stage: Stage, reason: str, began: float) -> Iterator[Event]:
        steps, best = self.position.step, self.position.best
        if best.weights and stage.restore_best:
            self.learner.restore(best.weights)
        self.learner.unwrap()
        moved = self.start.moved(self.learner.model, self.plan.layers)
        self.learner.leave()
        self.position.stage, self.position.step, self.position.best = stage.index + 1, 0, Best()
        seconds = time.perf_counter() - began
        # Told before the checkpoint is taken: whoever goes on from that finds all that happened before it on record.
        peak = memory.peak(self.learner.accelerator.device)
        yield StageEnded(stage.name, steps, reason, best.metrics, seconds, peak, moved)
        self._publish()

    def _prefix(self) -> tuple[str, float]:
        """What becomes of the frozen prefix in words, and the share of a forward pass that is replayed."""
        shortcut = self.learner.shortcut
        return shortcut.said, shortcut.line.saved if shortcut.line and shortcut.prefixes else 0.0

    # When

    def _evaluation_due(self, stage: Stage) -> bool:
        if self.learner.data.validation is None:
            return False
        every = self.learner.recipe.evaluation.eval_steps or stage.steps_per_epoch
        return self.position.step % every == 0 or self.position.step == stage.steps

    def _stale(self, stage: Stage) -> bool:
        return stage.early_stopping is not None and self.position.best.stale >= stage.early_stopping.patience

    def _keep(self, stage: Stage, judged: bool) -> None:
        """Publish a checkpoint where one is due; stop where a signal has asked for it.

        The last step of a stage needs none of its own: the end of the stage follows at once and is kept for good.
        """
        step, saving = self.position.step, self.learner.recipe.training.save_steps
        over = step == stage.steps or self._stale(stage)
        if self.learner.stopping or ((judged or step % saving == 0) and not over):
            self._publish()
        if self.learner.stopping:
            place = f"stage `{stage.name}`, step {step} of {stage.steps}"
            sentence = f"stopped as asked at {place}; the same command goes on from there"
            raise alike(self.learner.accelerator, sentence, STOPPED)

    def _publish(self) -> None:
        """Write a checkpoint on the main process; where that fails, every process fails with it."""
        learner = self.learner
        found = learner.untaken_loss(), learner.tensors(), learner.all_moments()
        together(learner.accelerator, lambda: self.position.publish(learner, self.plan, self.folder, *found))

    # How well

    def _metric(self, stage: Stage) -> str:
        own = stage.early_stopping.metric if stage.early_stopping else None
        return own or self.learner.recipe.evaluation.metric or (self.learner.metrics or ("loss",))[0]

    def _taken(self, stage: Stage, norm: float, seconds: float) -> Step:
        rates = tuple(group["lr"] for group in self.learner.optimizer.param_groups)
        return Step(stage.name, self.position.step, stage.steps, self.learner.taken_loss(), norm, rates, seconds)

    def _judged(self, stage: Stage, step: int, split: str) -> tuple[Evaluated, Confusion]:
        began = time.perf_counter()
        found = judge(self.learner, getattr(self.learner.data, split))
        seconds = time.perf_counter() - began
        return Evaluated(stage.name, step, split, found.metrics, seconds=seconds), found.confusion

    def _keep_confusion(self, judged: Evaluated, confusion: Confusion) -> None:
        """Keep how labels were confused by the weights that go on."""
        if confusion and self.learner.accelerator.is_main_process:
            labels = self.learner.facts.labels
            self.folder.keep_confusion(judged.split, judged.stage, judged.step, labels, confusion)

    def _weighed(self, stage: Stage, judged: Evaluated, confusion: Confusion) -> Evaluated:
        """Whether an evaluation is the best of its stage; if so its weights are kept.

        Raises `RunError` where the metric that decides is not a number: a best of nothing must not carry over.
        """
        metric = self._metric(stage)
        # The metrics are the same on every device; the decision is the first one's all the same.
        metrics = broadcast_object_list([judged.metrics])[0]
        if not math.isfinite(metrics[metric]):
            place = f"stage `{stage.name}`, step {judged.step}"
            sentence = f"{place}: `{metric}` is {metrics[metric]}, so nothing can be best; look at the validation rows"
            raise alike(self.learner.accelerator, sentence)
        best = self.position.best
        gained = best.weigh(metric, metrics, stage.early_stopping.min_delta if stage.early_stopping else 0.0)
        if gained and stage.restore_best:
            best.weights = self.learner.snapshot()
        if gained or not stage.restore_best:
            self._keep_confusion(judged, confusion)
        return replace(judged, best=gained)

    def _proved(self, saved: Path) -> list[Event]:
        """What moved and what stood still, up to the files of the saved model."""
        learner = self.learner
        proved = compare(self.before, digests(learner.model), learner.moved, learner.trained, saved)
        if not proved.unmoved:
            return [proved]
        names = ", ".join(proved.unmoved[:3])
        return [proved, Note(f"{len(proved.unmoved)} tensors trained without ever getting a gradient: {names}")]
