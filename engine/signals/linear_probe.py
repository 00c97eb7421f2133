"""Linear probes: what can be read off each layer with nothing trained but a logistic regression."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.signals.base import Evidence, Signal

STRENGTHS = (0.003, 0.03, 0.3)
"""Inverse strengths of the penalty that are tried on the first fold; the best by likelihood serves for all."""
WIDEST = 512
"""Principal components that stand in for features that are wider."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one probe has read, out of fold."""

    accuracy: float
    error: float
    """Standard error of the accuracy, over rows."""
    losses: np.ndarray
    """Negative log-likelihood of each row (rows,)."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood."""
        return float(self.losses.mean())


class LinearProbe(Signal):
    """Out-of-fold accuracy of a logistic regression on what each unit hands on, averaged over tokens or places.

    Alain & Bengio 2017, Understanding Intermediate Layers Using Linear Classifier Probes
    (https://arxiv.org/abs/1610.01644). It tells where the answer can be read off, and where it gets lost. What should
    train it doesn't tell: layers that probe well needn't matter for fine-tuning (Tamkin et al. 2020).
    """

    title = "linear probe"
    paper = "Alain & Bengio 2017"
    limits = "tells where the answer can be read, not what to train"
    needs = "features"

    type: Literal["linear_probe"] = "linear_probe"

    def measure(self, seen: Evidence) -> dict[str, float]:
        return {name: found.accuracy for name, found in self.curve(seen).items()}

    def curve(self, seen: Evidence) -> dict[str, Reading]:
        """What is read off each unit, in forward order."""
        return {name: probe(standard(features), seen.labels, seen.folds) for name, features in seen.features.items()}


def probe(features: np.ndarray, labels: np.ndarray, folds: Sequence[np.ndarray]) -> Reading:
    """A logistic regression on features (rows, width), judged on each fold by what the others taught."""
    everyone, strength = np.arange(len(labels)), None
    losses, right = np.empty(len(labels)), np.empty(len(labels))
    for held in folds:
        train = np.setdiff1d(everyone, held)
        tried = []
        for penalty in STRENGTHS if strength is None else (strength,):
            found = _fitted(features[train], labels[train], features[held], labels[held], penalty)
            tried.append((float(found[0].mean()), penalty, found))
        _, strength, (losses[held], right[held]) = min(tried, key=lambda each: each[0])
    judged = np.concatenate(list(folds))
    share = float(right[judged].mean())
    return Reading(share, float(np.sqrt(share * (1 - share) / len(judged))), losses[np.sort(judged)])


def standard(features: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1 (rows, width); no label is looked at."""
    given = np.asarray(features, dtype=np.float64)
    return (given - given.mean(0)) / (given.std(0) + 1e-6)


def narrow(features: np.ndarray, width: int = WIDEST) -> np.ndarray:
    """The first principal components (rows, at most `width`), in their own scale; no label is looked at."""
    if features.shape[1] <= width:
        return features
    centred = features - features.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return centred @ axes[:, ::-1][:, :width]


def majority(labels: np.ndarray, folds: Sequence[np.ndarray]) -> float:
    """Accuracy of whoever always says the most frequent class of the other folds."""
    hits = 0
    for held in folds:
        others = np.delete(labels, held)
        hits += int((labels[held] == np.bincount(others).argmax()).sum())
    return hits / sum(map(len, folds))


def _fitted(
    train: np.ndarray, taught: np.ndarray, judge: np.ndarray, truth: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each judged row, and whether it was right; a class never taught has no likelihood."""
    from sklearn.linear_model import LogisticRegression

    model: Any = LogisticRegression(C=penalty, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it says so where it stops early; likelihood out of fold tells what it is worth
        model.fit(train, taught)
        shares = model.predict_proba(judge)
    places = {label: place for place, label in enumerate(model.classes_)}
    said = [shares[row, places[label]] if label in places else 1e-6 for row, label in enumerate(truth)]
    return -np.log(np.maximum(said, 1e-6)), model.classes_[shares.argmax(axis=1)] == truth
