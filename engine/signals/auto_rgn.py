"""Relative gradient norm: how large a unit's gradient is for the size of its weights."""

from __future__ import annotations

from typing import Literal

from engine.freezing import parameters
from engine.signals.base import Evidence, Signal


class AutoRGN(Signal):
    """‖ḡ‖ / ‖θ‖, the mean over the unit's tensors, measured once.

    Lee et al. 2023, Surgical Fine-Tuning (https://arxiv.org/abs/2210.11466). There it is taken anew in each epoch and
    scales learning rates; as a ranking made once it is carried away by biases, norms and whatever is next to the loss.
    """

    title = "Auto-RGN, once"
    paper = "Lee et al. 2023"
    limits = "made for scaling rates while training; as a ranking it follows the size of tensors"
    needs = "gradients"

    type: Literal["auto_rgn"] = "auto_rgn"

    def measure(self, seen: Evidence) -> dict[str, float]:
        found, weights = seen.gradients, parameters(seen.model)
        assert found is not None
        scores = {}
        for unit in seen.units:
            ratios = [
                float(found.mean(name).norm() / (weights[name].detach().float().cpu().norm() + 1e-12))
                for name in unit.parameters
                if name in found.squares
            ]
            if ratios:
                scores[unit.name] = sum(ratios) / len(ratios)
        return scores
