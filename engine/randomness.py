"""Seeds that follow from what they are for. Keeps no generator and draws nothing itself."""

from __future__ import annotations

from hashlib import blake2b


def stable_seed(*parts: str | int | float | bool | None) -> int:
    """A seed in [0, 2**63) that depends on `parts` alone: equal on every machine, process and version of Python.

    Named parts (`stable_seed(recipe.seed, "dropout", stage, step)`) keep streams apart that must not share draws.
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
