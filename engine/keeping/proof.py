"""The proof that what trained is what the recipe says: a canary before a stage, a comparison after the run.

It compares bits and nothing else, and it leaves the model as it found it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from engine.devices import shards
from engine.devices.layerdrop import every_layer
from engine.errors import RunError
from engine.freezing import bare, movable, parameters, trainable
from engine.records import Proved

Digests = dict[str, str]
"""Name of a parameter or buffer in the bare model -> sha256 of its shape, type and bits."""


def digests(model: nn.Module) -> Digests:
    """The digest of every parameter and buffer."""
    tensors = {**parameters(model), **{bare(name): buffer for name, buffer in model.named_buffers()}}
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's type, shape and bits, as far as this process holds them."""
    flat = shards.share(tensor.detach()).cpu().contiguous().reshape(-1)
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if flat.numel():
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def canary(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor], stage: str) -> None:
    """An optimizer step on one real batch, or two where the first can't reach everything; looked at closely and undone.

    Raises `RunError` where the loss is not finite, where it doesn't reach something that should train, where the
    optimizer holds anything else or the forward pass opens it, where something frozen moves, buffers included, or where
    what trains would not be saved.
    """
    names = trainable(model)
    _agree(model, optimizer, stage)
    _savable(model, names, stage)
    before, moving = digests(model), movable(model)
    tensors = {**parameters(model), **{bare(name): buffer for name, buffer in model.named_buffers()}}
    kept = {name: tensors[name].detach().clone() for name in moving}
    try:
        with every_layer(model):
            if _take_step(optimizer, names, loss, stage):
                # LoRA's first matrix has no gradient until its second, which starts at 0, has moved.
                _take_step(optimizer, names, loss, stage)
        _agree(model, optimizer, stage)
        _stood_still(before, digests(model), moving, f"stage `{stage}`: a trial step")
    finally:
        for name, tensor in kept.items():
            tensors[name].data.copy_(tensor)
        optimizer.zero_grad(set_to_none=True)


def _agree(model: nn.Module, optimizer: torch.optim.Optimizer, stage: str) -> None:
    """Raise `RunError` unless the optimizer holds what trains: what it lacks has gradients and stands still."""
    held = {name for group in optimizer.param_groups for name in group["param_names"]}
    if odd := sorted(held ^ set(trainable(model))):
        raise RunError(f"stage `{stage}`: the optimizer and the model disagree about `{odd[0]}`")


def _savable(model: nn.Module, names: Mapping[str, nn.Parameter], stage: str) -> None:
    """Raise `RunError` where transformers leaves out of a saved model what trains, under each of its names."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    saved = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name not in left_out}
    if lost := [name for name, value in names.items() if id(value) not in saved]:
        raise RunError(f"stage `{stage}`: {some(lost)} would train and never be saved, for this model leaves it out")


def _take_step(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], loss: Callable[[], torch.Tensor], stage: str
) -> bool:
    """One step; whether something was left without a gradient."""
    value = loss()
    if not torch.isfinite(value):
        raise RunError(f"stage `{stage}`: the very first loss is {value.item()}; look at the labels and the inputs")
    value.backward()
    for name, parameter in names.items():
        if parameter.grad is None:
            raise RunError(f"stage `{stage}`: `{name}` should train, but the loss doesn't depend on it; freeze it")
        if not torch.isfinite(shards.whole(parameter.grad)).all():
            raise RunError(f"stage `{stage}`: the very first gradient of `{name}` is not finite")
    reached = {id(one) for one in names.values() if one.grad is not None and shards.whole(one.grad).any()}
    for group in optimizer.param_groups:
        if not any(id(parameter) in reached for parameter in group["params"]):
            raise RunError(f"stage `{stage}`: the loss gives no gradient to {some(group['param_names'])}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return len(reached) < len(names)


def _stood_still(before: Digests, after: Digests, moving: Collection[str], who: str) -> None:
    for name, was in before.items():
        if name not in moving and name in after and after[name] != was:
            raise RunError(f"{who} moved `{name}`, which is frozen; don't use this model")


def compare(before: Digests, after: Digests, moving: Collection[str], trained: Collection[str], folder: Path) -> Proved:
    """What moved and what stood still from the first step of a run to its saved model.

    `moving` is all that some stage could change, `trained` the parameters among it. Raises `RunError` where something
    frozen moved, where nothing that trained did, or where the saved model holds other bits than the run ended with.
    """
    _stood_still(before, after, moving, "the run")
    stuck = tuple(sorted(name for name in trained if name in after and before.get(name) == after[name]))
    if trained and len(stuck) == len(trained):
        raise RunError("nothing that trained has moved; raise the learning rate")
    held = saved_digests(folder)
    if lost := [name for name in trained if name in after and after[name] not in held]:
        raise RunError(f"the saved model doesn't hold {some(lost)} as the run ended")
    still = sum(before.get(name) == digest for name, digest in after.items() if name not in moving)
    return Proved(moved=len(trained) - len(stuck), still=still, unmoved=stuck)


def saved_digests(folder: Path) -> set[str]:
    """The digests of the tensors in a folder's safetensors files, whatever names transformers gave them there."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(digest(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return found


def some(names: Collection[str]) -> str:
    """The first of some names and how many more there are."""
    first, *others = sorted(names)
    return f"`{first}`" + (f" and {len(others)} more" if others else "")
