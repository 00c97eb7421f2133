"""A stage's optimizer, and the learning rate as a function of (stage, step).

Parameter groups carry names, and AdamW's moments go from stage to stage by name, never by position. There is no
scheduler object, so there is no scheduler state to save, to load or to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from engine.plan import Stage
from engine.recipe import Training

_SETTINGS = {"learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"}

Moments = dict[str, dict[str, torch.Tensor]]
"""Parameter name -> what the optimizer remembers of it (`step`, `exp_avg`, ...)."""


def build(stage: Stage, found: Mapping[str, nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The optimizer of a stage over the parameters it trains, one named group per rate and decay."""
    from transformers import Trainer, TrainingArguments

    # Its constructor would reset accelerate's state; only the optimizer's settings are read, so fields are enough.
    arguments = TrainingArguments.__new__(TrainingArguments)
    vars(arguments).update(training.model_dump(include=_SETTINGS))
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
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


def multiplier(stage: Stage) -> Callable[[int], float]:
    """Step (from 0) -> share of the peak rate, as transformers' schedule of that name has it."""
    from transformers import get_scheduler

    scratch = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        stage.lr_scheduler_type,
        scratch,
        num_warmup_steps=stage.warmup_steps,
        num_training_steps=stage.steps,
        scheduler_specific_kwargs=dict(stage.lr_scheduler_kwargs),
    )
    return schedule.lr_lambdas[0]


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
                    key: value.to(parameter.device) if moved or value.shape == parameter.shape else value
                    for key, value in remembered[name].items()
                }
                carried += 1
    return carried
