"""Frozen weights in two bytes each: `model.frozen_dtype`. What trains, the norms and the activations stay float32.

A layer that is kept so multiplies in its own type and hands on float32; its names stay as they are. What any stage
trains is never kept so, nor what an adapter has to read exactly. The model is saved as the run had it: these weights in
two bytes, rounded as they were in every step, and a config that says float32, so `from_pretrained` widens them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.errors import PlanError, Problem
from engine.freezing import parameters
from engine.plan import Plan
from engine.planning.narrowed import apart, read_exactly
from engine.prompts import listed
from engine.recipe import Model, Recipe

KEY = ("model", "frozen_dtype")
_PRODUCTS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Exactly these: a class of its own may read its weights past its forward, as `nn.MultiheadAttention` does."""


def refuse(recipe: Recipe) -> None:
    """Raise `PlanError` where another key says what type weights have, or something asks the model for its one type."""
    if recipe.model.frozen_dtype is None:
        return
    halved, quantised = recipe.model.dtype != "float32", recipe.model.quantization_config is not None
    if halved or quantised:
        what = f"`{'dtype' if halved else 'quantization_config'}` says already how weights are kept"
        raise PlanError([Problem(KEY, what, "leave one of the two keys out")])
    if prompts := listed(recipe):
        what = f"`{prompts[0].type}` has PEFT make virtual tokens in the one type of all weights"
        raise PlanError([Problem(KEY, what, "take LoRA, or leave the key out")])


def narrow(model: nn.Module, wanted: Model, plan: Plan | None) -> None:
    """Keep what no stage of a plan trains in the recipe's `frozen_dtype`, in place; nothing without plan or key."""
    if wanted.frozen_dtype is None or plan is None:
        return
    kind = getattr(torch, wanted.frozen_dtype)
    names = {name for stage in plan.stages for name in stage.trainable}
    whole = {id(tensor) for name, tensor in parameters(model).items() if name in names}
    exact = read_exactly(plan.stages)
    owners = {name: {id(tensor) for tensor in _own(module)} for name, module in model.named_modules()}
    able = {name for name, module in model.named_modules() if _able(module) and name not in exact}
    kept = apart(owners, able, whole)
    for name, module in model.named_modules():
        if name in kept:
            for tensor in _own(module):
                tensor.data = tensor.data.to(kind)
            module.__class__ = _narrow(type(module))
        elif isinstance(module, PreTrainedModel):
            module.__class__ = _float(type(module))


def widen(model: nn.Module, names: set[str]) -> None:
    """Bring the weights of some modules back to float32, in place, before an adapter is merged into them."""
    for name, tensor in parameters(model).items():
        if name.rpartition(".")[0] in names and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _able(module: nn.Module) -> bool:
    return type(module) in _PRODUCTS or isinstance(module, nn.Embedding)


@cache
def _narrow(kind: type) -> type:
    """A layer's class whose weights may be of another type than what comes in; what goes out is float32."""

    class Narrow(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else next(iter(kwargs.values()))
            if not given.is_floating_point():
                return super().forward(*args, **kwargs).float()
            if torch.is_autocast_enabled(given.device.type):
                return super().forward(*args, **kwargs)  # that brings both to its own type
            return super().forward(given.to(self.weight.dtype)).float()

    return _named_as(kind, Narrow)


@cache
def _float(kind: type) -> type:
    """A model's class that says float32 when it is asked for its type, where transformers says the first weight's."""

    class Float(kind):
        @property
        def dtype(self) -> torch.dtype:
            return torch.float32

    return _named_as(kind, Float)


def _named_as(kind: type, made: type) -> type:
    made.__name__, made.__qualname__, made.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return made
