"""Where a run is, as a checkpoint holds it, and the way back there.

A run keeps little: how many stages and steps are done, the tensors that some stage could change, AdamW's moments by
name, and the best so far. Data order, dropout and rates follow from the seed and the step, so nothing of them is kept,
and a run goes on with another number of devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from engine import checkpoint, freezing, optim
from engine.errors import RunError
from engine.keeping.folder import RunFolder
from engine.keeping.proof import some
from engine.learner import Learner
from engine.metrics import greater_is_better
from engine.plan import Plan

Tensors = dict[str, torch.Tensor]


@dataclass
class Best:
    """The best evaluation of a stage so far, and how long nothing has been better."""

    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    """Evaluations in a row without a gain."""
    weights: Tensors = field(default_factory=dict)

    def weigh(self, metric: str, metrics: dict[str, float], min_delta: float) -> bool:
        """Whether an evaluation beats the best by more than `min_delta`; if so it is the best from here on."""
        value = metrics[metric]
        gain = 0.0 if self.value is None else value - self.value
        if not greater_is_better(metric):
            gain = -gain
        if self.value is not None and gain <= min_delta:
            self.stale += 1
            return False
        self.value, self.metrics, self.stale = value, metrics, 0
        return True


@dataclass
class Position:
    """How far a run has come."""

    stage: int = 0
    """Stages that are over; the index of the one that is under way."""
    step: int = 0
    """Optimizer steps done in it."""
    best: Best = field(default_factory=Best)

    def publish(
        self,
        learner: Learner,
        plan: Plan,
        folder: RunFolder,
        unsaid: tuple[float, float],
        tensors: Tensors,
        remembered: optim.Moments,
    ) -> None:
        """Write a checkpoint of all that is needed to go on from here, then let old ones go. Main process only.

        What all processes have found together is given: `unsaid` is the loss that no record tells yet, `tensors` are
        the learner's, `remembered` is what its optimizers remember. Raises `RunError` where a weight isn't finite.
        """
        done = sum(stage.steps for stage in plan.stages[: self.stage]) + self.step
        between = self.step == 0
        state = {
            "step": 2 * done + between,  # the end of a stage and its last step are two positions
            "stage": self.stage,
            "stage_step": self.step,
            "plan": plan.fingerprint,
            "best": {"value": self.best.value, "metrics": _json(self.best.metrics), "stale": self.best.stale},
            "unsaid": list(unsaid),
            "trained": sorted(learner.trained),
            "moved": sorted(learner.moved),
            "micro": learner.batching.micro,
            "records": folder.recorded(),
            # Those of generated stages make room: a schedule has many, and each holds all that moved so far.
            "kept": between and isinstance(learner.recipe.stages, tuple),
        }
        changed = {name: tensors[name] for name in sorted(learner.moved | learner.trained) if name in tensors}
        _refuse_unfinite({name: changed[name] for name in freezing.parameters(learner.model) if name in changed})
        moments = {f"{name}::{key}": value for name, part in remembered.items() for key, value in part.items()}
        groups = {"weights": changed, "moments": moments, "best": self.best.weights}
        name = f"stage-{self.stage:02d}-step-{self.step:06d}"
        checkpoint.publish(folder.checkpoints, name, {group: held for group, held in groups.items() if held}, state)
        checkpoint.rotate(folder.checkpoints, learner.recipe.training.save_total_limit)


def resume(found: checkpoint.Checkpoint, learner: Learner, plan: Plan) -> Position:
    """Bring a freshly loaded learner to where a checkpoint was taken.

    The stages that are over are walked again for their adapters alone; then every tensor that they changed is put back.
    """
    state = found.state
    for stage in plan.stages[: state["stage"]]:
        learner.restructure(stage)
        if stage.then != "keep":
            learner.detach(stage.then)
    if state["stage"] < len(plan.stages) and state["stage_step"]:
        learner.restructure(plan.stages[state["stage"]])
    learner.restore(found.read("weights"))
    learner.trained, learner.moved = set(state["trained"]), set(state["moved"])
    for key, value in (found.read("moments") if "moments" in found.groups else {}).items():
        name, _, part = key.rpartition("::")
        learner.moments.setdefault(name, {})[part] = value
    learner.batching = learner.batching.limited(state["micro"])
    if learner.accelerator.is_main_process:
        learner.loss_sum, learner.weight_sum = state["unsaid"]
    metrics = {name: math.nan if value is None else value for name, value in state["best"]["metrics"].items()}
    weights = found.read("best") if "best" in found.groups else {}
    best = Best(state["best"]["value"], metrics, state["best"]["stale"], weights)
    return Position(state["stage"], state["stage_step"], best)


def _refuse_unfinite(tensors: Tensors) -> None:
    """Raise `RunError` where a weight is no number: a checkpoint of it would be what every later step goes on from."""
    lost = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if lost:
        raise RunError(f"{some(lost)} is no longer finite, so nothing of it is kept; lower the learning rate")


def _json(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics as JSON takes them: what is no number is None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
