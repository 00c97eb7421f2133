"""Spectrum: how much of a unit's singular values stand out from noise. It never sees the data."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from engine.freezing import parameters
from engine.signals.base import Evidence, Signal

LARGEST = 4096
"""Sides of a matrix beyond which it is left out: its singular values would take minutes."""


class Spectrum(Signal):
    """Mean, over the unit's matrices, of (Σ large singular values) / (Σ small ones) / largest.

    Hartford et al. 2024, Spectrum (https://arxiv.org/abs/2406.06623): large is beyond s (1 + √(n/m)), where s is the
    interquartile range over 1.349. That takes the range of singular values for the noise of entries: of pure noise, 384
    x 384, it calls a quarter signal, and of 384 x 1,536 all. Dividing by the largest makes it a matter of scale.
    """

    title = "Spectrum"
    paper = "Hartford et al. 2024"
    limits = "never sees the data, so it can't answer a question about them; takes noise for signal"
    needs = "weights"

    type: Literal["spectrum"] = "spectrum"

    def measure(self, seen: Evidence) -> dict[str, float]:
        weights = parameters(seen.model)
        scores = {}
        for unit in seen.units:
            matrices = [
                weights[name].detach().float().flatten(1) for name in unit.parameters if weights[name].dim() > 1
            ]
            found = [_signal(matrix) for matrix in matrices if max(matrix.shape) <= LARGEST and min(matrix.shape) > 1]
            if found:
                scores[unit.name] = sum(found) / len(found)
        return scores


def _signal(matrix: Tensor) -> float:
    """The score of one matrix."""
    values = torch.linalg.svdvals(matrix.cpu())
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75]))
    short, long = sorted(matrix.shape)
    threshold = float(high - low) / 1.349 * (1 + sqrt(short / long))
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return float(signal / (noise if float(noise) else 1.0) / values[0])
