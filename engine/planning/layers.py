"""A model as a person draws it: one layer per embedding, block and head, in forward order, and what trains in each.

Pure, like the plan that holds it. A layer has no weights here, only names, sizes and rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.outline import Outline, Parameter, below


@dataclass(frozen=True)
class Layer:
    """One row of the picture: a block, the embeddings, a part of the head, or what lies between them."""

    name: str
    """The module that it is."""
    role: str
    """`embeddings`, `block`, `head` or `other`."""
    size: int
    """Number of elements of the model's own parameters in it; tied weights count where they are owned."""
    parameters: tuple[str, ...]
    """Names of the parameters in it, adapters included; a tied one is in every layer that uses it."""


@dataclass(frozen=True)
class LayerState:
    """What trains of one layer in one stage."""

    weights: int = 0
    """Elements of the model's own."""
    adapters: int = 0
    """Elements of adapters."""
    learning_rates: tuple[float, ...] = ()
    """The peak rates that its parameters train at, highest first."""


def layers(outline: Outline) -> tuple[Layer, ...]:
    """Every layer that holds a parameter, in forward order: what inputs meet first comes first."""
    roles = dict.fromkeys(outline.blocks, "block")
    roles |= dict.fromkeys(outline.embeddings, "embeddings") | dict.fromkeys(outline.head, "head")
    held: dict[str, list[Parameter]] = {}
    for parameter in outline.parameters:
        owners = (parameter.module, *(alias.rpartition(".")[0] for alias in parameter.aliases))
        for root in dict.fromkeys(_root(owner, roles) for owner in owners):
            held.setdefault(root, []).append(parameter)
    order = _order(outline)
    return tuple(
        Layer(
            name=root or outline.architecture,
            role=roles.get(root, "other"),
            size=sum(p.size for p in held[root] if p.adapter is None and _root(p.module, roles) == root),
            parameters=tuple(p.name for p in held[root]),
        )
        for root in sorted(held, key=lambda root: order.get(root, -1))
    )


def states(
    drawn: tuple[Layer, ...], parameters: Mapping[str, Parameter], rates: Mapping[str, float]
) -> tuple[LayerState, ...]:
    """What trains of each layer, from the rate of everything that trains."""
    return tuple(_state([parameters[name] for name in layer.parameters if name in rates], rates) for layer in drawn)


def _state(trained: list[Parameter], rates: Mapping[str, float]) -> LayerState:
    return LayerState(
        weights=sum(p.size for p in trained if p.adapter is None),
        adapters=sum(p.size for p in trained if p.adapter is not None),
        learning_rates=tuple(sorted({rates[p.name] for p in trained}, reverse=True)),
    )


def _root(module: str, roles: Mapping[str, str]) -> str:
    """The layer that a module is drawn in: the known part around it, else the largest module that holds none."""
    for root in roles:
        if below(module, root):
            return root
    steps = module.split(".")
    outer = (".".join(steps[:length]) for length in range(1, len(steps) + 1))
    return next((name for name in outer if not any(below(root, name) for root in roles)), module)


def _order(outline: Outline) -> dict[str, int]:
    """Module -> the rank of the first forward call in it, or its place in the definition where it is never called."""
    ranks: dict[str, int] = {}
    for place, module in enumerate(outline.modules):
        rank = place if module.order is None else module.order
        steps = module.name.split(".")
        for length in range(1, len(steps) + 1):
            name = ".".join(steps[:length])
            ranks[name] = min(rank, ranks.get(name, rank))
    return ranks
