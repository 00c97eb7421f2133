"""Layers that a model leaves out at random as it trains (layerdrop; Fan et al. 2019), and what devices make of that.

Each device leaves out others. DDP takes that if it is told beforehand; FSDP2 gathers a layer on all devices at once and
would wait for ever, so there it is refused. Nothing here changes how often a layer is left out in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from engine.devices.processes import alike
from engine.errors import REFUSED
from engine.plan import Stage


def _rates(holders: Sequence[Any]) -> list[tuple[Any, str, float]]:
    """What of some modules and configs says how often a layer is left out: each holder, its attribute, the rate."""
    return [
        (holder, name, value)
        for holder in holders
        for name, value in vars(holder).items()
        if name.endswith(("layerdrop", "layer_drop")) and isinstance(value, float)
    ]


@contextmanager
def every_layer(model: nn.Module) -> Iterator[None]:
    """Inside, no layer is left out: one that is has no gradient, though it does train."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    kept = _rates([*configs.values(), *model.modules()])
    for holder, name, _ in kept:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


def droppers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a list of layers and leave some of them out, by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(isinstance(child, nn.ModuleList) for child in module.children())
        and any(rate for _, _, rate in _rates([module, *filter(None, [getattr(module, "config", None)])]))
    }


def announce(model: nn.Module, accelerator: Accelerator) -> None:
    """Have DDP look, step by step, for what a device has left out; otherwise it waits for its gradient in vain."""
    gaps = any(module.training for module in droppers(model).values())
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=gaps)


def refuse(model: nn.Module, stages: Sequence[Stage], accelerator: Accelerator) -> None:
    """Raise `RunError` where FSDP2 would spread a list of layers that trains and leaves some of them out."""
    for path in droppers(model):
        if any(name.startswith(f"{path}.") for stage in stages for name in stage.trainable):
            what = f"`{path}` leaves layers out at random (layerdrop), each device others, which FSDP2 waits for"
            advice = "set its layerdrop to 0 in config.json, or use DDP (`--multi_gpu` without `--use_fsdp`)"
            raise alike(accelerator, f"{what}; {advice}", REFUSED)
