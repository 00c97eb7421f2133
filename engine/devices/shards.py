"""FSDP2: a model is whole between two stages, and spread over the processes within one.

A stage trains a copy of the model, whose tensors are split between the processes; at its end they are put together
again, in the host's memory, where adapters come and go as on one device. Everything that puts tensors together is done
by all processes at once. Nothing here decides what trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from engine.devices.processes import alike
from engine.errors import REFUSED, PlanError, Problem, RunError
from engine.prompts import listed
from engine.recipe import Recipe

NO_CACHE = "nothing is kept while FSDP2 spreads the model"
Name = TypeVar("Name")


def refuse(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise `PlanError` or `RunError` for what can't be trained, or not judged, while the model is spread."""
    if not accelerator.is_fsdp2:
        return
    if recipe.model.dtype != "float32":
        what = "FSDP2 gathers a layer's weights in one precision, and those that train are float32"
        raise PlanError([Problem(("model", "dtype"), what, "leave the key out")])
    if recipe.model.frozen_dtype is not None:
        what = "FSDP2 splits weights in one precision, and frozen ones would have another"
        raise PlanError([Problem(("model", "frozen_dtype"), what, "use DDP, or leave the key out")])
    if recipe.model.quantization_config is not None:
        what = "FSDP2 splits weights in one precision, and those that are quantised have another"
        raise PlanError([Problem(("model", "quantization_config"), what, "use DDP, or leave the key out")])
    for prompt in listed(recipe):
        what = f"`{prompt.type}` has PEFT call the model within its own forward pass, which FSDP2 doesn't expect"
        raise RunError(f"{what}; use DDP (`--multi_gpu` without `--use_fsdp`)", exit_code=2)
    if recipe.task.writes:
        what = f"{recipe.task.type} is judged by what the model writes, which takes all of it on each device"
        raise RunError(f"{what}; use DDP (`--multi_gpu` without `--use_fsdp`)", exit_code=2)


@contextmanager
def spreading(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a model that accelerate can't spread is a sentence: one without layers of that name, or embeddings."""
    try:
        yield
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        if not accelerator.is_fsdp2:
            raise
        what = f"accelerate can't spread this model by FSDP2 ({' '.join(str(error).split())[:160]})"
        advice = "name the class of its layers by `--fsdp_transformer_layer_cls_to_wrap`, or use DDP (`--multi_gpu`)"
        raise alike(accelerator, f"{what}; {advice}", REFUSED) from error


def split(model: nn.Module) -> None:
    """Have each process hold its own share and no more: after a pass without gradients the last layers lie whole."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from the shares of all processes, on the CPU; any other as it is."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def all_whole(tensors: Mapping[Name, torch.Tensor]) -> dict[Name, torch.Tensor]:
    """Each of some tensors, put together; every process asks for the same ones in the same order."""
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


def share(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; of one that is made of others, as torchao's are, all their bits."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # pyright: ignore
    return torch.cat([part.detach().contiguous().reshape(-1).view(torch.uint8) for part in inner])


def like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value, on the device of `tensor` and spread as that is."""
    value = value.to(tensor.device)
    if not hasattr(tensor, "to_local") or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)  # pyright: ignore
