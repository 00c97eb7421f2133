"""What a plan knows of a model: the names, sizes and order of its modules. Plain values; no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor, by the name it has in the bare model."""

    name: str
    """Dotted name, e.g. `bert.encoder.layer.0.output.dense.bias`; an adapter's tensor has PEFT's own name."""
    module: str
    """The module that owns it; for an adapter's tensor, the module it adapts."""
    shape: tuple[int, ...]
    adapter: str | None = None
    """The adapter it belongs to, or None for the model's own."""
    aliases: tuple[str, ...] = ()
    """Other names of the same storage (tied weights)."""

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass(frozen=True)
class Module:
    """One module, with its place in the forward pass and its price."""

    name: str
    kind: str
    """Name of its class."""
    order: int | None = None
    """Rank of its first call in a forward pass; None when it is never called itself."""
    flops: float = 0.0
    """Forward FLOPs of one example spent in the module itself, its children left out."""


@dataclass(frozen=True)
class Outline:
    """A model without its weights."""

    architecture: str
    """Name of the model's class."""
    modules: tuple[Module, ...]
    """Every module but the root, in definition order."""
    parameters: tuple[Parameter, ...]
    """Every parameter once, in definition order; tied names are aliases."""
    buffers: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    """The repeated blocks of the largest stack, in forward order."""
    head: tuple[str, ...] = ()
    """The modules a task adds on top of the pretrained model."""
    embeddings: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    """Parameters that no checkpoint fills, so they start at random; empty until the checkpoint has been looked at."""
    measured: bool = True
    """Whether order and FLOPs come from a traced forward pass; otherwise from definition order and sizes."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(module.name for module in self.modules)

    @cached_property
    def owned(self) -> dict[str, tuple[Parameter, ...]]:
        """Module name -> the parameters it owns itself."""
        owned: dict[str, list[Parameter]] = {}
        for parameter in self.parameters:
            owned.setdefault(parameter.module, []).append(parameter)
        return {name: tuple(parameters) for name, parameters in owned.items()}

    @property
    def size(self) -> int:
        """Number of elements of the model's own parameters, adapters left out."""
        return sum(parameter.size for parameter in self.parameters if parameter.adapter is None)


def below(name: str, root: str) -> bool:
    """Whether module or parameter `name` is `root` or lies inside it; every name lies inside the root `""`."""
    return not root or name == root or name.startswith(root + ".")
