"""Makes a model obey a stage: what trains, what stands still, and what stays in eval mode.

The only place that writes `requires_grad`. Everything here goes by the names of the bare model, whatever has been
injected into it since.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def bare(name: str) -> str:
    """The name a tensor has in the bare model: PEFT wraps a layer in another one that calls it `base_layer`."""
    return name.replace(".base_layer", "")


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by its name in the bare model."""
    return {bare(name): parameter for name, parameter in model.named_parameters()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by their names in the bare model."""
    return {name: parameter for name, parameter in parameters(model).items() if parameter.requires_grad}


def obey(model: nn.Module, names: Collection[str]) -> None:
    """Train exactly the named parameters, in float32, and leave no gradient behind on the others.

    A frozen parameter with a stale gradient would still be moved by an optimizer, and AdamW in bfloat16 leaves most
    weights where they were: their updates round to nothing.
    """
    found = parameters(model)
    if missing := sorted(set(names) - set(found)):
        raise KeyError(f"the model has no parameter {missing[0]}")
    for name, parameter in found.items():
        parameter.grad = None
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.float()


def train_mode(model: nn.Module) -> None:
    """Put what trains into train mode and keep whatever is wholly frozen in eval mode.

    A frozen BatchNorm would go on counting and a frozen dropout would go on dropping, so neither would be frozen.
    A module without parameters goes with the module that holds it.
    """
    _set_mode(model, True)


def _set_mode(module: nn.Module, inherited: bool) -> None:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    module.training = any(flags) if flags else inherited
    for child in module.children():
        _set_mode(child, module.training)


def movable(model: nn.Module) -> set[str]:
    """Names of the tensors that a step may change: what trains, and the buffers of whatever is in train mode."""
    buffers = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if module.training
        for name, _ in module.named_buffers(recurse=False)
    }
    return set(trainable(model)) | {bare(name) for name in buffers}


@contextmanager
def all_trainable(model: nn.Module, inputs: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Every float parameter (and float input) trains inside, for tracing; afterwards each has its own flag again."""
    flags = [(tensor, tensor.requires_grad) for tensor in (*model.parameters(), *inputs)]
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(tensor.is_floating_point())
        yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


@contextmanager
def only_trainable(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """The named parameters, as far as they are floats, train inside and no others; afterwards each has its own flag."""
    flags = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
    try:
        for name, parameter, _ in flags:
            parameter.requires_grad_(name in names and parameter.is_floating_point())
        yield
    finally:
        for _, parameter, flag in flags:
            parameter.requires_grad_(flag)


def differentiable(tensor: torch.Tensor) -> torch.Tensor:
    """Make `tensor` a leaf that gradients reach; reentrant checkpointing drops the gradients of weights otherwise."""
    return tensor.requires_grad_(True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
