"""Optimizers and rates: lr = f(stage, step) in closed form, moments that go by name, arguments that go somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import cos, pi, sqrt
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
import torch
from running import FROZEN, draft, events, place, refused, run, stage
from torch import nn

from engine import optim
from engine.errors import ENVIRONMENT, PlanError, RunError
from engine.plan import Group, Stage
from engine.recipe import Training
from engine.records import Proved, StageStarted
from engine.schedules.base import SchedulerName

WARMUP, STEPS, PEAK = 5, 25, 2e-3


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def planned(scheduler: str = "constant", arguments: dict[str, Any] | None = None, **fields: Any) -> Stage:
    """A stage as a plan has it, with two groups of which the second has a tenth of the rate."""
    groups = (Group(("a", "b"), PEAK, 0.01), Group(("c",), PEAK / 10, 0.0))
    needed = dict.fromkeys(Stage.__dataclass_fields__, None) | {"name": "s", "groups": groups, "steps": STEPS}
    schedule = {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": arguments or {}, "warmup_steps": WARMUP}
    return Stage(**{**needed, **schedule, **fields})


# Rates


def warmed(after: Callable[[float], float]) -> Callable[[int], float]:
    """A linear climb to the peak, and from there a function of the share of the remaining steps that is done."""
    return lambda step: step / WARMUP if step < WARMUP else after((step - WARMUP) / (STEPS - WARMUP))


def stable(step: int) -> float:
    """A climb, ten steps at the peak, and half a cosine over the last ten."""
    return warmed(lambda _: (1 + cos(pi * max(0, step - STEPS + 10) / 10)) / 2)(step)


FORMS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "linear": ({}, warmed(lambda done: 1 - done)),
    "cosine": ({}, warmed(lambda done: (1 + cos(pi * done)) / 2)),
    "cosine_with_restarts": ({"num_cycles": 2}, warmed(lambda done: (1 + cos(pi * (2 * done % 1))) / 2)),
    "cosine_with_min_lr": ({"min_lr": PEAK / 4}, warmed(lambda done: 1 / 4 + 3 / 4 * (1 + cos(pi * done)) / 2)),
    "cosine_warmup_with_min_lr": (
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5},
        lambda step: 0.5 + 0.5 * step / (WARMUP - 1) if step < WARMUP else late_cosine(step),
    ),
    "polynomial": ({"lr_end": PEAK / 5, "power": 2.0}, warmed(lambda done: 0.2 + 0.8 * (1 - done) ** 2)),
    "constant": ({}, lambda _: 1.0),
    "constant_with_warmup": ({}, warmed(lambda _: 1.0)),
    "inverse_sqrt": ({}, lambda step: step / WARMUP if step < WARMUP else sqrt(WARMUP / step)),
    "warmup_stable_decay": ({"num_decay_steps": 10}, stable),
}


def late_cosine(step: int) -> float:
    """transformers counts this one's progress from one step on: it ends at its minimum in the last step itself."""
    done = (step - WARMUP + 1) / (STEPS - WARMUP)
    return 0.1 + 0.9 * (1 + cos(pi * done)) / 2


def test_every_schedule_has_its_form() -> None:
    assert set(FORMS) == set(get_args(SchedulerName))


@pytest.mark.parametrize("name", FORMS)
def test_rate_is_a_function_of_the_step(name: str) -> None:
    arguments, form = FORMS[name]
    share = optim.multiplier(planned(name, arguments))
    forwards = [share(step) for step in range(STEPS)]
    assert forwards == pytest.approx([form(step) for step in range(STEPS)], abs=1e-9)
    assert [share(step) for step in reversed(range(STEPS))] == forwards[::-1]


@pytest.mark.parametrize("name", FORMS)
def test_rate_is_the_one_that_torch_would_set(name: str) -> None:
    """Step by step as `transformers.Trainer` has it: an optimizer at one rate, and a schedule that is stepped."""
    from transformers import get_scheduler

    alone = planned(name, FORMS[name][0], groups=(Group(("a",), PEAK, 0.0),))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    arguments = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}
    schedule = get_scheduler(name, optimizer, **arguments, scheduler_specific_kwargs=FORMS[name][0])
    share = optim.multiplier(alone)
    for step in range(STEPS):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK * share(step), rel=1e-12)
        optimizer.step()
        schedule.step()


def test_groups_keep_their_ratio() -> None:
    found = {name: nn.Parameter(torch.zeros(2)) for name in "abc"}
    optimizer = optim.build(planned(), found, Training())
    optim.set_rates(optimizer, 0.5)
    optim.set_rates(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([PEAK / 4, PEAK / 40])
    assert [group["param_names"] for group in optimizer.param_groups] == [["a", "b"], ["c"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize(
    ("scheduler", "arguments", "key", "said"),
    [
        ("linear", {"power": 2.0}, "power", "`linear` has no such argument; it takes none"),
        ("constant", {"num_cycles": 2}, "num_cycles", "`constant` has no such argument; it takes none"),
        ("cosine", {"cycles": 2}, "cycles", "`cosine` has no such argument; it has num_cycles"),
        ("cosine_with_min_lr", {}, None, "One of min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": 0.1}, None, "the rate would be 10 times its peak"),
        ("warmup_stable_decay", {}, None, "`warmup_stable_decay` needs `num_decay_steps`"),
        ("polynomial", {"lr_end": 0.1}, None, "lr_end (0.1) must be smaller than initial lr (0.01)"),
        ("cosine", {"num_cycles": "two"}, None, "could not convert string to float"),
    ],
)
def test_arguments_of_a_schedule(
    tmp_path: Path, scheduler: str, arguments: dict[str, Any], key: str | None, said: str
) -> None:
    training = {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": arguments}
    found, sentence = refused(place(tmp_path), training=training)
    assert found == ("training", "lr_scheduler_kwargs", *([key] if key else []))
    assert said in sentence


def test_argument_of_one_stage_is_none_of_the_others(tmp_path: Path) -> None:
    training = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}
    stages = [stage("one", lr_scheduler_type="constant"), stage("two", steps=10)]
    one, two = draft(place(tmp_path), training=training, stages=stages).plan.stages
    assert optim.multiplier(one)(3) == 1.0
    assert optim.multiplier(two)(5) == pytest.approx(0.25, abs=1e-4)


# Optimizers


def descend(optimizer: torch.optim.Optimizer, found: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(found.values()):
            parameter.grad = torch.sin(parameter.detach() + number + step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


OPTIMIZERS = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "sgd": "momentum=0.9",
    "adafactor": None,
    "adagrad": None,
    "rmsprop": "momentum=0.9",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_go_by_name_and_never_by_position(name: str) -> None:
    """Three steps, another optimizer over the same parameters in another order, three more: as if it were one."""
    training = Training(optim=name, optim_args=OPTIMIZERS[name])  # pyright: ignore[reportArgumentType]
    whole, cut = ({key: nn.Parameter(torch.full((3, 4), ord(key) / 99)) for key in "abc"} for _ in range(2))
    optimizer = optim.build(planned(), whole, training)
    descend(optimizer, whole, range(6))
    first = optim.build(planned(), cut, training)
    descend(first, cut, range(3))
    turned = replace(planned(), groups=(Group(("c",), PEAK / 10, 0.0), Group(("b", "a"), PEAK, 0.01)))
    second = optim.build(turned, cut, training)
    assert optim.carry(second, optim.moments(first)) == 3
    descend(second, cut, range(3, 6))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_moments_of_others_stay_behind() -> None:
    found = {key: nn.Parameter(torch.ones(2)) for key in "abc"}
    first = optim.build(planned(groups=(Group(("a", "c"), PEAK, 0.0),)), found, Training())
    descend(first, {key: found[key] for key in "ac"}, range(1))
    second = optim.build(planned(groups=(Group(("b", "c"), PEAK, 0.0),)), found, Training())
    assert optim.carry(second, optim.moments(first)) == 1
    assert set(optim.moments(second)) == {"c"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_stages_with_each_optimizer(tmp_path: Path, name: str) -> None:
    stages = [stage("head", learning_rate=1e-3), stage("top", unfreeze="@blocks[-1]", learning_rate=1e-3)]
    training = {"optim": name, "optim_args": OPTIMIZERS[name]}
    happened = run(place(tmp_path), freeze=FROZEN, stages=stages, training=training)
    assert [event.carried for event in events(happened, StageStarted)] == [0, 4]
    assert events(happened, Proved)[0].unmoved == ()


def test_moments_are_forgotten_where_the_recipe_says_so(tmp_path: Path) -> None:
    stages = [stage("head"), stage("top", unfreeze="@blocks[-1]", moments="reset")]
    happened = run(place(tmp_path), freeze=FROZEN, stages=stages)
    assert [event.carried for event in events(happened, StageStarted)] == [0, 0]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("adamw_torch", "amsgrad=true", "`amsgrad` goes nowhere with `adamw_torch`"),
        ("sgd", "momentum=0.9, momentun=0.9", "`momentun` goes nowhere with `sgd`"),
        ("sgd", "weight_decay=0.1", "`weight_decay` goes nowhere with `sgd`; `training.weight_decay` says that"),
        ("sgd", "momentum", "`momentum` is no argument; write `key=value`"),
        ("sgd", "momentum=much", "`sgd` refuses its arguments: could not convert string to float"),
        ("sgd", "nesterov=true", "`sgd` refuses its arguments: Nesterov momentum requires a momentum"),
    ],
)
def test_arguments_of_an_optimizer(name: str, arguments: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        optim.obtain(Training(optim=name, optim_args=arguments))  # pyright: ignore[reportArgumentType]
    (problem,) = caught.value.problems
    assert problem.key == ("training", "optim_args")
    assert said in problem.sentence


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_that_go_somewhere(name: str) -> None:
    optim.obtain(Training(optim=name, optim_args=OPTIMIZERS[name]))  # pyright: ignore[reportArgumentType]


def test_optimizer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import trainer_optimizer

    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(RunError, match="`optim: adamw_8bit`: You need to install `bitsandbytes`") as caught:
        run(place(tmp_path), training={"optim": "adamw_8bit"})
    assert caught.value.exit_code == ENVIRONMENT
