"""What every signal is: one cheap measurement that says something about which layers to unfreeze.

A signal proposes and explains; it never decides and never takes a candidate out: none of them ranks layers reliably.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from engine.advising.units import Unit
from engine.part import Part


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the loss by parameter name, of small batches that were dealt into two halves."""

    halves: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    """The mean gradient of each half."""
    squares: Mapping[str, Tensor]
    """The mean, over batches, of the square of each element."""
    batches: int

    def mean(self, name: str) -> Tensor:
        """The mean gradient of a parameter over all batches."""
        one, other = self.halves
        return (one[name] + other[name]) / 2


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that a signal may look at; what a budget didn't reach is empty."""

    units: tuple[Unit, ...]
    """In forward order."""
    model: nn.Module
    """As it was loaded."""
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """(rows,)"""
    folds: Sequence[np.ndarray] = ()
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Unit -> what it hands on, averaged over tokens or places (rows, width)."""
    bypassed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Unit -> what the last unit hands on where this one hands on what it was given (rows, width)."""
    gradients: Gradients | None = None
    """At a head that has been fitted; at a random one they measure the distance to a random head."""


class Signal(Part, ABC):
    """A score for each unit: the higher, the more the signal speaks for training it."""

    title: ClassVar[str]
    """How a reader is told of it."""
    paper: ClassVar[str]
    limits: ClassVar[str]
    """What it can't see, in one sentence."""
    needs: ClassVar[Literal["features", "bypass", "gradients", "weights"]]

    @property
    def name(self) -> str:
        return str(getattr(self, "type"))  # noqa: B009

    @abstractmethod
    def measure(self, seen: Evidence) -> dict[str, float]:
        """Unit -> score; units that the signal has nothing to say of are left out."""
