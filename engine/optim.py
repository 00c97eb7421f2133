"""A stage's optimizer, and the learning rate as a function of (stage, step).

Parameter groups carry names, and AdamW's moments go from stage to stage by name, never by position. There is no
scheduler object, so there is no scheduler state to save, to load or to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from engine.devices import shards
from engine.errors import ENVIRONMENT, PlanError, Problem, RunError
from engine.plan import Stage
from engine.recipe import Training

_SETTINGS = {"learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"}

Moments = dict[str, dict[str, torch.Tensor]]
"""Parameter name -> what the optimizer remembers of it (`step`, `exp_avg`, ...)."""


def build(stage: Stage, found: Mapping[str, nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The optimizer of a stage over the parameters it trains, one named group per rate and decay."""
    kind, settings = _kind(training, training.optim_args)
    groups = [
        {
            "params": [(name, found[name]) for name in group.parameters],
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
            "peak": group.learning_rate,
        }
        for group in stage.groups
    ]
    return kind(groups, **settings)


def _kind(training: Training, optim_args: str | None) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and its settings, as transformers reads them."""
    from transformers import Trainer, TrainingArguments

    # Its constructor would reset accelerate's state; only the optimizer's settings are read, so fields are enough.
    arguments = TrainingArguments.__new__(TrainingArguments)
    vars(arguments).update(training.model_dump(include=_SETTINGS) | {"optim_args": optim_args})
    return Trainer.get_optimizer_cls_and_kwargs(arguments)


def obtain(training: Training) -> None:
    """Raise `RunError` where the optimizer's package is missing, `PlanError` where its arguments go nowhere.

    transformers looks for the arguments it knows and passes over all others; each is tried by itself here.
    """
    try:
        _, plain = _kind(training, None)
    except ImportError as error:
        raise RunError(f"`optim: {training.optim}`: {' '.join(str(error).split())[:200]}", ENVIRONMENT) from error
    key = ("training", "optim_args")
    words = [word.strip() for word in (training.optim_args or "").split(",")] if training.optim_args else []
    for word in words:
        name, equals, _ = word.partition("=")
        if not equals or not name:
            raise PlanError([Problem(key, f"`{word}` is no argument", "write `key=value`, with commas between")])
        if name == "weight_decay" or not _taken(training, name, plain):
            advice = "`training.weight_decay` says that" if name == "weight_decay" else "remove it"
            raise PlanError([Problem(key, f"`{name}` goes nowhere with `{training.optim}`", advice)])
    try:
        kind, settings = _kind(training, training.optim_args)
        kind([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], **settings)
    except (TypeError, ValueError) as error:
        raise PlanError([Problem(key, f"`{training.optim}` refuses its arguments: {error}")]) from error


def _taken(training: Training, name: str, plain: dict[str, Any]) -> bool:
    """Whether an argument of the optimizer changes anything, or is at least looked at: 0.123 is no whole number."""
    try:
        return _kind(training, f"{name}=0.123")[1] != plain
    except ValueError:
        return True


def multiplier(stage: Stage) -> Callable[[int], float]:
    """Step (from 0) -> share of the peak rate, as transformers' schedule of that name has it.

    Rates among its arguments (`min_lr`, `lr_end`) are measured by the stage's highest peak.
    """
    from transformers import get_scheduler

    scratch = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=max(group.learning_rate for group in stage.groups))
    known = schedule_arguments(stage.lr_scheduler_type)
    schedule = get_scheduler(
        stage.lr_scheduler_type,
        scratch,
        num_warmup_steps=stage.warmup_steps,
        num_training_steps=stage.steps,
        scheduler_specific_kwargs={key: value for key, value in stage.lr_scheduler_kwargs.items() if key in known},
    )
    return schedule.lr_lambdas[0]


def schedule_arguments(name: str) -> dict[str, bool]:
    """The arguments that the schedule `name` takes besides its lengths, and whether it can't do without them."""
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    parameters = signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    return {key: value.default is Parameter.empty for key, value in parameters.items() if key not in given}


def schedule_problems(stages: Sequence[Stage]) -> list[Problem]:
    """What `lr_scheduler_kwargs` has wrong: an argument that no stage's schedule takes, one missing, one refused."""
    key = ("training", "lr_scheduler_kwargs")
    known = {name: schedule_arguments(name) for name in dict.fromkeys(stage.lr_scheduler_type for stage in stages)}
    taken = sorted({argument for arguments in known.values() for argument in arguments})
    problems = [
        Problem((*key, argument), f"{' and '.join(f'`{name}`' for name in known)} has no such argument", _it_has(taken))
        for argument in (stages[0].lr_scheduler_kwargs if stages else ())
        if argument not in taken
    ]
    for stage in stages:
        place = f"stage `{stage.name}`: `{stage.lr_scheduler_type}`"
        missing = [name for name, needed in known[stage.lr_scheduler_type].items() if needed]
        missing = [name for name in missing if name not in stage.lr_scheduler_kwargs]
        if missing:
            problems.append(Problem(key, f"{place} needs `{missing[0]}`", "write it there"))
        elif said := _refusal(stage):
            problems.append(Problem(key, f"{place}: {said}"))
    return problems


def _it_has(taken: Sequence[str]) -> str:
    return f"it has {', '.join(taken)}" if taken else "it takes none"


def _refusal(stage: Stage) -> str:
    """Why a schedule can't be what its arguments say, or nothing."""
    try:
        share = multiplier(stage)
        shares = [share(step) for step in (0, stage.steps // 2, stage.steps - 1, stage.steps)]
    except (TypeError, ValueError, ArithmeticError) as error:
        return " ".join(str(error).split())
    worst = max(shares, key=abs)
    return f"the rate would be {worst:g} times its peak" if not -1e-9 <= worst <= 1 + 1e-9 else ""


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to this share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def moments(optimizer: torch.optim.Optimizer) -> Moments:
    """What the optimizer remembers, by parameter name."""
    return {
        name: {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def carry(optimizer: torch.optim.Optimizer, remembered: Moments) -> int:
    """Give the optimizer the moments of the parameters it shares with an earlier one; returns how many."""
    carried = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in remembered:
                # Step counters stay on the CPU, where reading them is cheap, unless a fused kernel reads them.
                moved = group.get("fused") or group.get("capturable")
                optimizer.state[parameter] = {
                    key: shards.like(parameter, value) if moved or value.dim() else value
                    for key, value in remembered[name].items()
                }
                carried += 1
    return carried
