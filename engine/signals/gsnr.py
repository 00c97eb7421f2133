"""Gradient signal-to-noise ratio: how much of a unit's gradient is common to all rows."""

from __future__ import annotations

from typing import Literal

from engine.signals.base import Evidence, Signal


class GSNR(Signal):
    """‖ḡ‖² / tr Var(g) over small batches: the share of a unit's gradient that rows agree on.

    Liu et al. 2020, Understanding Why Neural Networks Generalize Well Through GSNR of Parameters
    (https://arxiv.org/abs/2001.07384), who tie it to how well one step generalises. Variance is that of batches.
    """

    title = "GSNR"
    paper = "Liu et al. 2020"
    limits = "one step at the start; at a random head it ranks units upside down"
    needs = "gradients"

    type: Literal["gsnr"] = "gsnr"

    def measure(self, seen: Evidence) -> dict[str, float]:
        found = seen.gradients
        assert found is not None
        scores = {}
        for unit in seen.units:
            names = [name for name in unit.parameters if name in found.squares]
            norm = sum(float(found.mean(name).square().sum()) for name in names)
            total = sum(float(found.squares[name].sum()) for name in names)
            if total > norm:
                scores[unit.name] = norm / (total - norm)
        return scores
