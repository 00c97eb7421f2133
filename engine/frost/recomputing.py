"""Activations that are computed again on the way back instead of being kept: less memory for a forward pass more.

It concerns only the blocks that gradients pass through; below them nothing is kept anyway. The usual switch also makes
what leaves the embeddings differentiable, so that each step goes down to there: 2.4 times the work where one block of
six trains. Gradients stay the same to the bit: what was drawn at random is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.frost.replay import Line
from engine.modelling.outlining import blocks


def above(model: nn.Module, line: Line | None) -> tuple[nn.Module, ...]:
    """The blocks above the frost line; where there is none, all: nothing is computed again that no gradient reaches."""
    early = set(line.early) if line else set()
    return tuple(block for name in blocks(model) if (block := model.get_submodule(name)) not in early)


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each of the modules keeps what it was given for the way back, and nothing of what it computes."""
    before = {module: module.__dict__.get("forward") for module in modules}
    for module in modules:
        module.__dict__["forward"] = partial(_forward, module.forward)
    try:
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward")
            if forward is not None:
                module.__dict__["forward"] = forward


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
