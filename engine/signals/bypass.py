"""Bypass: what could be read off the model's last layer if a unit handed on what it was given."""

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.signals.base import Evidence, Signal
from engine.signals.linear_probe import narrow, probe, standard

COMPONENTS = 64
"""Principal components that are read."""


class Bypass(Signal):
    """How much less a probe of the last layer loses without the unit, paired out of fold, in standard errors.

    Blocks with a residual connection bear it to be left out (Veit et al. 2016, Residual Networks Behave Like Ensembles
    of Relatively Shallow Networks, https://arxiv.org/abs/1605.06431). One that the model says more without has been
    damaged, or has learnt what isn't asked here. It is an intervention on the user's rows, with a paired error.
    """

    title = "bypass"
    paper = "Veit et al. 2016"
    limits = "tells which unit is in the way, not that training it is what helps most"
    needs = "bypass"

    type: Literal["bypass"] = "bypass"

    def measure(self, seen: Evidence) -> dict[str, float]:
        if not seen.bypassed:
            return {}
        whole = self._losses(next(reversed(seen.features.values())), seen)
        return {name: _sureness(whole - self._losses(found, seen)) for name, found in seen.bypassed.items()}

    def _losses(self, features: np.ndarray, seen: Evidence) -> np.ndarray:
        return probe(narrow(standard(features), COMPONENTS), seen.labels, seen.folds).losses


def _sureness(gained: np.ndarray) -> float:
    """The mean of differences in its standard errors."""
    return float(gained.mean() / (gained.std(ddof=1) / np.sqrt(len(gained)) + 1e-12))
