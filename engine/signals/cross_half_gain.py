"""Cross-half gain: how far one Adam step on a unit would lower the loss of rows that it wasn't computed on."""

from __future__ import annotations

from typing import Literal

from engine.signals.base import Evidence, Signal


class CrossHalfGain(Signal):
    """First-order decrease of held-out loss by one step of Adam on the unit: Σ ā·b̄ / √E[g²].

    ā and b̄ are the mean gradients of two halves of the rows. Where they disagree, a step learns what holds for one half
    alone. An identity of first order and no paper's own; it knows neither curvature nor what a long run does.
    """

    title = "cross-half gain"
    paper = "first-order identity; Kingma & Ba 2015 for the step"
    limits = "sees the first step only, and misleads where a damaged unit hides what lies above it"
    needs = "gradients"

    type: Literal["cross_half_gain"] = "cross_half_gain"

    def measure(self, seen: Evidence) -> dict[str, float]:
        found = seen.gradients
        assert found is not None
        one, other = found.halves
        return {
            unit.name: sum(
                float((one[p] * other[p] / (found.squares[p].sqrt() + 1e-12)).sum())
                for p in unit.parameters
                if p in one
            )
            for unit in seen.units
        }
