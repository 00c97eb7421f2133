"""Seeds that follow from what they are for. Keeps no generator and draws nothing itself."""

from __future__ import annotations

from hashlib import blake2b


def stable_seed(*parts: str | int | float | bool | None) -> int:
    """A seed in [0, 2**63) that depends on `parts` alone: equal on every machine, process and version of Python.

    Named parts (`stable_seed(recipe.seed, "dropout", stage, step)`) keep streams apart that must not share draws.
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_draws(*parts: str | int) -> None:
    """Let what a forward pass draws follow from `parts`: dropout from torch, SpecAugment's masks from numpy.

    Where there is no accelerator this leaves out what `torch.manual_seed` does for each: it would remember the call,
    and the stack it came from, for a CUDA that never starts, which costs a millisecond a step and is never freed.
    """
    import numpy as np
    import torch

    seed = stable_seed(*parts)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
