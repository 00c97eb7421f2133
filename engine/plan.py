"""What will happen: a pure function of the recipe, the model's outline and the number of examples.

A plan is a frozen value, printable, JSON and fingerprinted. It names every parameter that trains, in which stage, at
which rate, and where the frost line lies. It never changes the recipe, and it needs no weights and no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from engine.errors import PlanError, Problem
from engine.outline import Outline, Parameter, below
from engine.planning.forecast import Costs, Forecast, Sizes, forecast
from engine.planning.layers import Layer, LayerState, layers, states
from engine.planning.narrowed import narrowed
from engine.planning.openings import Attachment, Opening, StageOpenings, resolve
from engine.prompts import virtual_tokens
from engine.recipe import Recipe
from engine.schedules.base import EarlyStopping, StageEntry


@dataclass(frozen=True)
class Group:
    """Parameters that train alike."""

    parameters: tuple[str, ...]
    learning_rate: float
    """Peak rate."""
    weight_decay: float


@dataclass(frozen=True)
class Stage:
    """One stage, down to the names of what trains."""

    index: int
    name: str
    opens: tuple[Opening, ...]
    """What each pattern of the stage opened."""
    attaches: tuple[Attachment, ...]
    """The adapters that are put on at its start."""
    groups: tuple[Group, ...]
    steps: int
    """Optimizer steps at most."""
    steps_per_epoch: int
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict[str, Any]
    warmup_steps: int
    early_stopping: EarlyStopping | None
    restore_best: bool
    moments: str
    then: str
    size: int
    """Number of elements that train."""
    weights: int
    """Of these, the model's own."""
    optimizer_bytes: int
    gradient_bytes: int
    line: str | None
    """The first block or module in forward order that holds something trainable: the frost line lies right below."""
    below: float
    """Share of a forward pass that lies below the frost line."""
    cost: float
    """FLOPs of a step as a share of one that trains everything."""
    cached_cost: float
    """The same where everything below the frost line is replayed."""
    layers: tuple[LayerState, ...]
    """What trains of each layer of the plan."""
    forecast: Forecast
    """What it will cost: FLOPs, memory, disk and time."""

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that train, in the order of the groups."""
        return tuple(name for group in self.groups for name in group.parameters)

    @property
    def adapters(self) -> int:
        """Number of adapter elements that train."""
        return self.size - self.weights


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    architecture: str
    size: int
    """Number of elements of the model's own parameters."""
    examples: int
    """Training examples."""
    batch_size: int
    """Examples per optimizer step, over all devices."""
    seed: int
    measured: bool
    """Whether the order and cost of modules were traced, or guessed from definition order and sizes."""
    sizes: Sizes
    """How many rows and how long they are: what the forecasts were made from."""
    layers: tuple[Layer, ...]
    """The model's layers, in forward order."""
    stages: tuple[Stage, ...]
    fingerprint: str = field(default="", compare=False)
    """sha256 over everything else."""

    def timed(self, flops_per_second: float) -> Plan:
        """The same plan, with an estimate of how long each stage takes at a rate; its fingerprint stays."""
        stages = (
            replace(stage, forecast=replace(stage.forecast, seconds=stage.forecast.flops / flops_per_second))
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages))

    def json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return json.loads(json.dumps(asdict(self), default=lambda part: part.model_dump()))


def make(recipe: Recipe, outline: Outline, examples: int, sizes: Sizes | None = None) -> Plan:
    """The plan of a recipe for a model and a number of training examples; `sizes` says more of them for the forecast.

    `outline` holds the parameters of all of `attachments(recipe, outline)`. Raises `PlanError` with every problem.
    """
    openings = resolve(recipe, outline)
    problems = list(openings.problems) + _untrained(openings.stages, outline)
    if problems:
        raise PlanError(problems)
    outline = replace(outline, narrow=narrowed(recipe, outline, openings.stages))
    optimizer_bytes = _optimizer_bytes(recipe.training.optim)
    drawn, sizes = layers(outline), sizes or Sizes.assumed(examples, outline.tokens)
    stages: list[Stage] = []
    for opened in openings.stages:
        stages.append(_stage(recipe, outline, opened, examples, sizes, optimizer_bytes, drawn, stages))
    plan = Plan(
        architecture=outline.architecture,
        size=outline.size,
        examples=examples,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        measured=outline.measured,
        sizes=sizes,
        layers=drawn,
        stages=tuple(stages),
    )
    content = json.dumps(plan.json(), sort_keys=True)
    return replace(plan, fingerprint=hashlib.sha256(content.encode()).hexdigest())


def attachments(recipe: Recipe, outline: Outline) -> tuple[Attachment, ...]:
    """The adapters that some stage attaches, each with the modules it goes to.

    Raises `PlanError` where an adapter has nowhere to go.
    """
    openings = resolve(recipe, outline)
    # A rate for adapters that are not attached yet seems to be for nothing; `make` judges rates.
    if problems := [problem for problem in openings.problems if "learning_rate" not in problem.key]:
        raise PlanError(problems)
    return tuple(attachment for stage in openings.stages for attachment in stage.attaches)


def _untrained(stages: tuple[StageOpenings, ...], outline: Outline) -> list[Problem]:
    trained = {name for stage in stages for name in stage.trainable}
    if lost := [name for name in outline.random if name not in trained]:
        what = f"`{lost[0]}` starts at random, for the checkpoint doesn't hold it, and no stage trains it"
        more = f" (and {len(lost) - 1} more like it)" if len(lost) > 1 else ""
        return [Problem(("freeze",), what + more, "unfreeze it in the first stage, or freeze less: `@head` names it")]
    if lost := [name for name in outline.grown if name not in trained]:
        what = f"`{lost[0]}` has rows for the tokens that are added, and no stage trains it"
        then = "unfreeze `@embeddings`, and the head where it has such rows, in some stage"
        return [Problem(("model",), what, then)]
    return []


def _stage(
    recipe: Recipe,
    outline: Outline,
    opened: StageOpenings,
    examples: int,
    sizes: Sizes,
    optimizer_bytes: float,
    drawn: tuple[Layer, ...],
    earlier: Sequence[Stage],
) -> Stage:
    entry, training = opened.entry, recipe.training
    if any(opening.what == "virtual tokens" for opening in opened.opens):
        sizes = sizes.lengthened(virtual_tokens(recipe))
    costs = Costs(outline, frozenset(opened.trainable))
    trained, size = costs.trained, sum(parameter.size for parameter in costs.trained)
    before = {name for stage in earlier for name in stage.trainable} if entry.moments == "keep" else set()
    remembered = sum(p.size for p in outline.parameters if p.name in before | set(opened.trainable))
    per_epoch = ceil(examples / recipe.batch_size)
    steps = entry.steps or max(1, round((entry.epochs or 0) * per_epoch))
    groups = _groups(recipe, entry, outline, opened, trained)
    rates = {name: group.learning_rate for group in groups for name in group.parameters}
    warmup = training.warmup_steps if entry.warmup_steps is None else entry.warmup_steps
    return Stage(
        index=opened.index,
        name=entry.name,
        opens=opened.opens,
        attaches=opened.attaches,
        groups=groups,
        steps=steps,
        steps_per_epoch=per_epoch,
        lr_scheduler_type=entry.lr_scheduler_type or training.lr_scheduler_type,
        lr_scheduler_kwargs=training.lr_scheduler_kwargs,
        # A share leaves at least the last step out of the warm-up: a stage of one step would train at a rate of 0.
        warmup_steps=min(ceil(warmup * steps), steps - 1) if warmup < 1 else int(warmup),
        early_stopping=entry.early_stopping,
        restore_best=entry.restore_best,
        moments=entry.moments,
        then=entry.then,
        size=size,
        weights=sum(parameter.size for parameter in trained if parameter.adapter is None),
        optimizer_bytes=round(size * optimizer_bytes),
        gradient_bytes=size * 4,
        layers=states(drawn, {parameter.name: parameter for parameter in trained}, rates),
        **_cost(costs),
        forecast=forecast(
            recipe,
            costs,
            sizes,
            steps,
            per_epoch,
            round(remembered * optimizer_bytes),
            copied=entry.restore_best and sizes.validation > 0,
        ),
    )


def _groups(
    recipe: Recipe, entry: StageEntry, outline: Outline, opened: StageOpenings, trained: list[Parameter]
) -> tuple[Group, ...]:
    """One group for each pair of rate and decay, in the order of their first parameter."""
    decay = recipe.training.weight_decay if entry.weight_decay is None else entry.weight_decay
    layer_decay = recipe.training.layer_decay if entry.layer_decay is None else entry.layer_decay
    kinds = {module.name: module.kind for module in outline.modules}
    groups: dict[tuple[float, float], list[str]] = {}
    for parameter in trained:
        rate = opened.rates[parameter.name] * layer_decay ** _depth(parameter, outline)
        spared = "bias" in parameter.name or "norm" in kinds.get(parameter.module, "").lower()
        groups.setdefault((rate, 0.0 if spared else decay), []).append(parameter.name)
    return tuple(Group(tuple(names), rate, decay) for (rate, decay), names in groups.items())


def _depth(parameter: Parameter, outline: Outline) -> int:
    """How many layers lie above a parameter: none above the head, one above the last block, all above embeddings."""
    for index, block in enumerate(outline.blocks):
        if below(parameter.module, block):
            return len(outline.blocks) - index
    early = any(below(parameter.module, name) for name in outline.embeddings)
    return len(outline.blocks) + 1 if early else 0


def _cost(costs: Costs) -> dict[str, Any]:
    """Where the frost line lies and what a step costs, from each module's forward FLOPs f.

    Forward is f. Backward is f again for the gradient of a module's input, needed above the line, and f for the
    gradient of its weights, needed where they train; training everything is 3 f.
    """
    forward, above, back = costs.forward() or 1.0, costs.forward(replayed=True), costs.backward()
    return {
        "line": costs.line,
        "below": 1 - above / forward,
        "cost": (forward + back) / (3 * forward),
        "cached_cost": (above + back) / (3 * forward),
    }


def _optimizer_bytes(optim: str) -> float:
    """Bytes of optimizer state for each element that trains, as far as the optimizer's name tells."""
    if "8bit" in optim:
        return 2.0
    if "4bit" in optim:
        return 1.0
    return {"sgd": 0.0, "adafactor": 0.02, "adagrad": 4.0, "rmsprop": 4.0}.get(optim, 8.0)
