"""How far each layer of a model has moved from where it started: a measure for reports, not a proof.

It keeps a fixed sample of each tensor's start and nothing else, so its memory doesn't grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from engine.freezing import bare, parameters
from engine.modelling.quantizing import packed, unpacked
from engine.planning.layers import Layer

SAMPLE = 65_536
"""Most elements that are kept of one tensor; smaller ones are measured exactly."""


class Start:
    """Where the weights of a model were before anything trained."""

    def __init__(self, model: nn.Module):
        held = packed(model)
        self.still = frozenset(held)
        """What is quantised, and so never changes by itself."""
        self.samples: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, int] = {}
        for name, tensor in parameters(model).items():
            whole = unpacked(held[name]) if name in held else tensor
            self.samples[name], self.sizes[name] = _sample(whole), whole.numel()

    def moved(self, model: nn.Module, layers: Iterable[Layer]) -> dict[str, float]:
        """Layer -> norm of the change of its weights as a share of the norm they had, its adapters taken into account.

        A layer that started at zero has no such share and is left out.
        """
        now = parameters(model)
        changes = dict(_adapter_changes(model))
        moved: dict[str, float] = {}
        for layer in layers:
            names = [name for name in layer.parameters if name in self.samples and name in now]
            start = math.fsum(_squares(self.samples[name], self.sizes[name]) for name in names)
            if start:
                moved[layer.name] = math.sqrt(
                    math.fsum(self._squared_change(name, now[name], changes.get(name)) for name in names) / start
                )
        return moved

    def _squared_change(self, name: str, tensor: torch.Tensor, adapted: torch.Tensor | None) -> float:
        was = self.samples[name]
        change = torch.zeros_like(was) if name in self.still else _sample(tensor) - was
        if adapted is not None:
            change = change + adapted
        return _squares(change, self.sizes[name])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    # An odd stride visits every column of a matrix: their number is nearly always even.
    stride = math.ceil(flat.numel() / SAMPLE) | 1
    return flat[::stride].float().cpu().clone()


def _squares(sample: torch.Tensor, size: int) -> float:
    """The sum of squares of a tensor of `size` elements, as its sample tells it."""
    return float(sample.double().square().sum()) * size / max(1, sample.numel())


ADDITIVE = {"c3a", "fourierft", "gralora", "loha", "lokr", "lora", "peanut", "randlora", "tinylora", "unilora"}
ADDITIVE |= {"vblora", "vera", "waveft"}
"""Kinds whose `get_delta_weight` is a matrix that is added; that of HRA, OFT and their kin turns the weight instead."""


def _adapter_changes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weight -> a sample of what the adapters on it add, where that is a matrix."""
    for name, module in model.named_modules():
        package, *parts = type(module).__module__.split(".")  # to ask `isinstance` of PEFT's abstract class is dear
        if package != "peft" or parts[1] not in ADDITIVE or not hasattr(module, "get_delta_weight"):
            continue
        weight = f"{bare(name)}.weight"
        live = [adapter for adapter in module.active_adapters if adapter not in module.merged_adapters]
        known = [a for a in live if any(a in getattr(module, part) for part in module.adapter_layer_names)]
        with torch.no_grad():
            deltas = [_sample(module.get_delta_weight(adapter)) for adapter in known]  # pyright: ignore
        if deltas:
            yield weight, torch.stack(deltas).sum(0)
