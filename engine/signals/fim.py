"""Fisher information: how much the loss cares about a unit's weights."""

from __future__ import annotations

from typing import Literal

from engine.signals.base import Evidence, Signal


class FIM(Signal):
    """Σ E[g²] over the unit's weights: the trace of its empirical Fisher information.

    Lodha et al. 2023, On Surgical Fine-tuning for Language Encoders (https://arxiv.org/abs/2310.17041), who take the
    highest few layers by it. Gradients here are those of small batches, so it is smaller than that of single rows, for
    all units alike. It has no measure of what generalises.
    """

    title = "Fisher information"
    paper = "Lodha et al. 2023"
    limits = "large units and those next to the loss win; what is noise counts as much as what is not"
    needs = "gradients"

    type: Literal["fim"] = "fim"

    def measure(self, seen: Evidence) -> dict[str, float]:
        found = seen.gradients
        assert found is not None
        return {
            unit.name: sum(float(found.squares[name].sum()) for name in unit.parameters if name in found.squares)
            for unit in seen.units
        }
