"""Claims about shifts, tried on handwritten digits: LP-FT in and out of distribution, and surgical fine-tuning.

A ResNet of 80,000 weights learns half of scikit-learn's 1,797 digits of 8 x 8 pixels (Alpaydin & Kaynak 1998) by a
recipe; the other half is what it is tuned to and judged on, changed as the claim wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _digits import _digits
from _lab import Came, Finding, Lab, mean

SEED, SIDE = 13, 32
RECIPE = """
model: {model}
task: image-classification
data: {{path: {data}, splits: {{test: test}}}}
stages:
  - {{name: all, steps: 150, learning_rate: 1e-3, lr_scheduler_type: constant}}
batch_size: 32
evaluation: accuracy
"""
PRETRAIN = ("stages.all.steps=", "stages.all.epochs=12", "stages.all.learning_rate=3e-3", "data.splits.test=")
PROBE = ('freeze=["@embeddings", "@blocks"]', "stages.all.steps=200", "stages.all.learning_rate=1e-2")
THEN = 'stages={{"type": "lp_ft", "head_epochs": {epochs}, "head_learning_rate": 1e-2, "steps": 150}}'
PROBE_THEN = ('freeze=["@embeddings", "@blocks"]', "training.learning_rate=1e-3", "training.lr_scheduler_type=constant")
UNITS = {"embedder": "@embeddings", "block 0": "@blocks[0]", "block 1": "@blocks[1]", "block 2": "@blocks[2]"}
UNITS |= {"head": "@head", "all": ""}
RATES = ("1e-3", "3e-3")

Pictures = np.ndarray


def halves() -> tuple[tuple[Pictures, np.ndarray], tuple[Pictures, np.ndarray]]:
    """Pictures (digits, 8, 8) and what they show (digits,): those to pretrain on, and the others."""
    pictures, shown = _digits()
    drawn = np.random.default_rng(SEED).permutation(len(shown))
    return (pictures[drawn[:900]], shown[drawn[:900]]), (pictures[drawn[900:]], shown[drawn[900:]])


def write(folder: Path, split: str, pictures: Pictures, labels: np.ndarray) -> None:
    """`<folder>/<split>/<label>/<number>.png`."""
    from PIL import Image

    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        (place := folder / split / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(picture)).save(place / f"{number:04}.png")


def pretrained(lab: Lab, turned: bool) -> str:
    """A model that knows the first half of the digits, upright and, where `turned`, on their side as well."""
    name = "two-domains" if turned else "one-domain"
    if not (lab.folder / "runs" / name / "model").is_dir():
        (pictures, shown), (others, theirs) = halves()
        if turned:
            pictures, shown = np.concatenate([pictures, np.rot90(pictures, axes=(1, 2))]), np.tile(shown, 2)
        write(lab.folder / f"pictures-{name}", "train", pictures, shown)
        write(lab.folder / f"pictures-{name}", "validation", others[:200], theirs[:200])
        _start(lab.folder / "start")
        lab.fit(name, RECIPE.format(model="start", data=f"pictures-{name}"), PRETRAIN, keep=True)
    return f"runs/{name}/model"


def _start(folder: Path) -> None:
    """A ResNet that has learnt nothing yet, and the image processor that goes with it."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    torch.manual_seed(SEED)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


# LP-FT: Kumar et al. 2022, https://arxiv.org/abs/2202.10054


def lp_ft(lab: Lab, seeds: int = 3) -> Finding:
    """Tune to four new classes by few upright digits; judge upright ones, and ones on their side."""
    model, (pictures, shown) = pretrained(lab, turned=True), halves()[1]
    labels = 2 * (shown % 2) + (shown >= 5)  # a label that pretraining never saw: odd or even, small or large
    lines, verdicts = [f"{'':24}{'in':>8}{'out of distribution':>22}"], []
    for count in (50, 200):
        data = f"pictures-parity-{count}"
        if not (lab.folder / data).is_dir():
            write(lab.folder / data, "train", pictures[:count], labels[:count])
            write(lab.folder / data, "validation", pictures[200:600], labels[200:600])
            write(lab.folder / data, "test", np.rot90(pictures[200:600], axes=(1, 2)), labels[200:600])
        then = THEN.format(epochs=round(200 * 32 / count))
        ways = {"probe": PROBE, "fine-tune": (), "probe, then fine-tune": (*PROBE_THEN, then)}
        came = {way: _seeds(lab, f"{data}-{way}", model, data, words, seeds) for way, words in ways.items()}
        means = {way: mean(found) for way, found in came.items()}
        lines += [f"n={count:<4}{way:18}{known:>8.3f}{new:>22.3f}" for way, (known, new) in means.items()]
        probe, tuned, both = means.values()
        verdicts += [
            (f"n={count}: out of distribution LP-FT beats FT", both[1] > tuned[1]),
            (f"n={count}: out of distribution LP beats FT", probe[1] > tuned[1]),
            (f"n={count}: in distribution LP-FT is no worse than either", both[0] >= max(probe[0], tuned[0]) - 0.005),
        ]
    return Finding(tuple(lines), tuple(verdicts))


def _seeds(lab: Lab, name: str, model: str, data: str, words: tuple[str, ...], seeds: int) -> list[Came]:
    recipe, slug = RECIPE.format(model=model, data=data), name.replace(", ", "-").replace(" ", "-")
    return [lab.fit(f"{slug}-{seed}", recipe, (*words, f"seed={seed}")) for seed in range(seeds)]


# Surgical fine-tuning: Lee et al. 2023, https://arxiv.org/abs/2210.11466


def mixed(pictures: Pictures) -> Pictures:
    """Every pixel with a little of all others: a fixed matrix near the identity."""
    noise = np.random.default_rng(SEED).normal(size=(64, 64)) / 8
    flat = pictures.reshape(len(pictures), 64).astype(float) @ (np.eye(64) + 0.5 * noise)
    return flat.clip(0, 255).round().astype(np.uint8).reshape(-1, 8, 8)


def inverted(pictures: Pictures) -> Pictures:
    return 255 - pictures


def inputs(lab: Lab) -> Finding:
    """Other pixels, the same labels: the first blocks alone should do."""
    lines, verdicts = [], []
    for change in (mixed, inverted):
        found = _surgery(lab, change.__name__, lambda x, y, change=change: (change(x), y))
        lines.append(_line(change.__name__, found))
        alone = {unit: value for unit, value in found.items() if unit != "all"}
        best = max(alone, key=lambda unit: alone[unit])
        verdicts += [
            (f"{change.__name__}: one block alone is no worse than all", alone[best] >= found["all"]),
            (f"{change.__name__}: it is an early or a middle one", best not in ("head", "block 2")),
            (f"{change.__name__}: of the blocks and the head, the head is worst", _worst(alone) == "head"),
        ]
    return Finding((_head(), *lines), tuple(verdicts))


def outputs(lab: Lab) -> Finding:
    """The same pixels, other labels: the last layer alone should do."""
    found = _surgery(lab, "relabelled", lambda x, y: (x, 9 - y))
    best = max((unit for unit in found if unit != "all"), key=lambda unit: found[unit])
    verdicts = [("the head alone is best", best == "head"), ("it beats all", found["head"] > found["all"])]
    return Finding((_head(), _line("y -> 9 - y", found)), tuple(verdicts))


def _worst(alone: dict[str, float]) -> str:
    """The worst unit, the embedder left aside: it has 0.4% of the weights."""
    return min((unit for unit in alone if unit != "embedder"), key=lambda unit: alone[unit])


def _surgery(lab: Lab, name: str, change: Callable[[Any, Any], tuple[Any, Any]], seeds: int = 2) -> dict[str, float]:
    """Accuracy on 600 test pictures after each unit alone was tuned on 60; its rate is chosen by the loss on 100."""
    model, data = pretrained(lab, turned=False), f"pictures-{name}"
    if not (lab.folder / data).is_dir():
        pictures, labels = change(*halves()[1])
        for split, rows in {"train": slice(60), "validation": slice(60, 160), "test": slice(160, 760)}.items():
            write(lab.folder / data, split, pictures[rows], labels[rows])
    return {
        unit: _unit(lab, f"{name}-{unit.replace(' ', '-')}", model, data, part, seeds) for unit, part in UNITS.items()
    }


def _unit(lab: Lab, name: str, model: str, data: str, pattern: str, seeds: int) -> float:
    words = ("freeze=.*", f"stages.all.unfreeze={pattern}") if pattern else ()

    def fit(rate: str, seed: int) -> Came:
        more = ("stages.all.steps=100", f"stages.all.learning_rate={rate}", f"seed={seed}")
        return lab.fit(f"{name}-{rate}-{seed}", RECIPE.format(model=model, data=data), (*words, *more))

    first = {rate: fit(rate, 0) for rate in RATES}
    rate = min(first, key=lambda rate: first[rate].loss)
    return mean([first[rate], *(fit(rate, seed) for seed in range(1, seeds))])[1]


def _head() -> str:
    return f"{'':14}" + "".join(f"{unit:>10}" for unit in UNITS)


def _line(name: str, found: dict[str, float]) -> str:
    return f"{name:14}" + "".join(f"{value:>10.3f}" for value in found.values())
