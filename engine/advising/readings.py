"""The two cheap rungs of advice: what can be read off each layer, and how the loss pulls at each unit.

They explain what runs will say, and propose one pair of neighbours to try. They never decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from engine.advising import passes
from engine.advising.advice import Advice, Probed
from engine.advising.bench import Bench
from engine.advising.budget import Clock
from engine.advising.trials import Weights, folds
from engine.randomness import stable_seed
from engine.signals import SIGNALS, Evidence
from engine.signals.linear_probe import Reading, majority, narrow, probe, standard

TOGETHER = 64
"""Principal components of each layer in the probe that reads all of them."""

Folds = Sequence[np.ndarray]


def probes(bench: Bench, advice: Advice, held: Folds, clock: Clock) -> list[str]:
    """Probes of every layer, alone and together, with what a probe reads that has no right to, and of fewer rows."""
    features = passes.features(bench, clock)
    for name, found in _each(features, bench.labels, held, clock):
        advice.probes[name] = found
    advice.controls["majority"] = majority(bench.labels, held)
    best = advice.best_layer
    if best is None:
        return []
    name, bare = passes.raw(bench)
    advice.controls[name] = probe(bare, bench.labels, held[:2]).accuracy
    clock.check()
    shuffled = np.random.default_rng(stable_seed(advice.seed, "shuffled")).permutation(bench.labels)
    advice.controls["shuffled labels"] = probe(standard(features[best]), shuffled, held[:2]).accuracy
    _grow(advice, features[best], bench.labels)
    clock.check()
    every = np.concatenate([narrow(standard(found), TOGETHER) for found in features.values()], axis=1)
    advice.together = _probed(probe(every, bench.labels, held[:2]))
    return _read_out(advice, best)


def scores(bench: Bench, advice: Advice, head: Weights, held: Folds, clock: Clock) -> list[str]:
    """What every signal says of every unit, at a fitted head."""
    found = passes.gradients(bench, head, clock, advice.seed)
    few = _few(bench, advice.seed)
    last = passes.features(bench, clock, [unit for unit in bench.units if unit.name == advice.last_layer], few)
    without = passes.bypassed(bench, clock, few) if last else {}
    parts = [np.flatnonzero(np.isin(few, fold)) for fold in held]
    seen = Evidence(bench.units, bench.learner.model, bench.labels[few], parts, last, without, found)
    advice.scores["linear_probe"] = {name: each.accuracy for name, each in advice.probes.items()}
    for kind in SIGNALS:
        if kind.needs != "features":
            clock.check()
            if told := kind().measure(seen):  # pyright: ignore
                advice.scores[kind().name] = told  # pyright: ignore
    return [f"{kind.title}: {_order(advice.scores[n])}" for kind in SIGNALS if (n := kind().name) in advice.scores]  # pyright: ignore


def _few(bench: Bench, seed: int) -> np.ndarray:
    """The rows, or some of them, in order."""
    return np.sort(np.random.default_rng(stable_seed(seed, "few")).permutation(bench.rows)[: passes.FEW])


def proposed(bench: Bench, advice: Advice) -> list[str]:
    """The pair of neighbouring blocks that gain most by the cross-half score, unless it is a candidate anyway."""
    gain = advice.scores.get("cross_half_gain", {})
    blocks = [unit.name for unit in bench.units if unit.name.startswith("block") and unit.name in gain]
    pairs = list(pairwise(blocks))
    if len(pairs) < 2:
        return []
    pair = max(pairs, key=lambda two: gain[two[0]] + gain[two[1]])
    return [] if pair == pairs[-1] else list(pair)  # the uppermost pair is tried as the top


def _each(
    features: Mapping[str, np.ndarray], labels: np.ndarray, held: Folds, clock: Clock
) -> Iterator[tuple[str, Probed]]:
    for name, found in features.items():
        clock.check()
        yield name, _probed(probe(standard(found), labels, held))


def _grow(advice: Advice, features: np.ndarray, labels: np.ndarray) -> None:
    """What is read with a quarter and with half of the rows."""
    draw = np.random.default_rng(stable_seed(advice.seed, "growth")).permutation(len(labels))
    for part in (4, 2):
        rows = np.sort(draw[: len(labels) // part])
        found = probe(standard(features[rows]), labels[rows], folds(labels[rows], SPLITS, advice.seed))
        advice.growth[len(rows)] = found.accuracy
    if best := advice.best_layer:
        advice.growth[len(labels)] = advice.probes[best].accuracy


SPLITS = 4
"""Folds of a probe that sees fewer rows."""


def _read_out(advice: Advice, best: str) -> list[str]:
    found, last = advice.probes[best], advice.last_layer
    controls = ", ".join(f"{name} {share:.1%}" for name, share in advice.controls.items())
    said = [f"a linear probe reads most off {best}: {found.accuracy:.1%} (controls: {controls})"]
    if advice.lost_above:
        said.append(f"{last} says less ({advice.probes[str(last)].accuracy:.1%}): some of it gets lost above {best}")
    return said


def _probed(found: Reading) -> Probed:
    return Probed(found.accuracy, found.error, found.loss)


def _order(told: Mapping[str, float], most: int = 3) -> str:
    return " > ".join(sorted(told, key=lambda name: -told[name])[:most])
