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
class Amount:
    """Something that grows with an example's length in tokens; where examples have none, `fixed` is all of it."""

    fixed: float = 0.0
    linear: float = 0.0
    """A token."""
    square: float = 0.0
    """A pair of tokens."""

    def at(self, tokens: float, squared: float | None = None) -> float:
        """How much it is for `tokens` tokens; of a mean, `squared` is the mean of the squared lengths."""
        return self.fixed + self.linear * tokens + self.square * (tokens**2 if squared is None else squared)


@dataclass(frozen=True)
class Price:
    """What one module by itself, its children left out, takes for one example."""

    work: Amount = Amount()
    """Forward FLOPs."""
    takes: Amount = Amount()
    """Elements of the first tensor that it is given."""
    gives: Amount = Amount()
    """Elements of the first tensor that it hands on."""
    keeps: Amount = Amount()
    """Bytes that it keeps for the way back where its weights train."""
    passes: Amount = Amount()
    """Bytes that it keeps where gradients only pass through it."""
    attention: Amount = Amount()
    """Further bytes that attention keeps for the way back where no kernel computes it in one go, as on CPUs."""


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
    price: Price = Price()
    """What it takes by the length of an example, as far as that could be read off a skeleton."""


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
    grown: tuple[str, ...] = ()
    """Parameters with rows for tokens that the recipe adds, which no checkpoint fills either."""
    tokens: int = 0
    """Tokens of the text that `flops` stand for; 0 where the model takes no text."""
    narrow: int = 0
    """Elements of weights that a run keeps in the recipe's `frozen_dtype`."""
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
