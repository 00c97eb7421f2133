"""Which layers are kept in `model.frozen_dtype`, and what that spares. Plain values; no weights, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from engine.outline import Outline
from engine.recipe import Recipe

_ABLE = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d")
_ADDED = ("lora", "ia3")
"""Kinds of adapters that work beside a layer and never look at its weights."""
Tensor = TypeVar("Tensor", bound=Hashable)


def apart(owners: Mapping[str, set[Tensor]], able: set[str], whole: Iterable[Tensor]) -> set[str]:
    """The modules of `able` whose tensors lie in no other module and are none of `whole`, which stay as they are.

    `owners` has the tensors of every module: a tied weight has one type in all modules that hold it.
    """
    whole, before = set(whole), -1
    while len(whole) != before:
        before = len(whole)
        for name, tensors in owners.items():
            if name not in able or tensors & whole:
                whole |= tensors
    return {name for name in able if owners[name] and not owners[name] & whole}


def read_exactly(stages: Iterable[Any]) -> set[str]:
    """The modules whose weights some adapter reads or rewrites, so that they have to be the checkpoint's own.

    `stages` are those of a plan, or what they open.
    """
    found: set[str] = set()
    for attachment in (attachment for stage in stages for attachment in stage.attaches):
        start = attachment.fields.get("init_lora_weights", True)
        plain = start in (True, False, "gaussian", "orthogonal") and not attachment.fields.get("use_dora")
        if attachment.kind not in _ADDED or not plain:
            found.update(attachment.targets)
    return found


def narrowed(recipe: Recipe, outline: Outline, stages: Iterable[Any]) -> int:
    """Number of elements that are kept in the recipe's `frozen_dtype`."""
    if recipe.model.frozen_dtype is None:
        return 0
    stages = tuple(stages)
    trained, exact = {name for stage in stages for name in stage.trainable}, read_exactly(stages)
    owners: dict[str, set[str]] = {module.name: set() for module in outline.modules}
    sizes: dict[str, int] = {}
    for parameter in outline.parameters:
        if parameter.adapter is None:
            sizes[parameter.name] = parameter.size
            for name in (parameter.name, *parameter.aliases):
                owners.setdefault(name.rpartition(".")[0], set()).add(parameter.name)
    able = {
        m.name for m in outline.modules if m.name not in exact and (m.kind in _ABLE or m.kind.endswith("Embedding"))
    }
    kept = apart(owners, able, trained)
    return sum(sizes[name] for name in set().union(*(owners[module] for module in kept)))
