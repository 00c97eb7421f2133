"""Cases whose answer is known: models with one block damaged on purpose, pictures that have shifted, rows for a regret.

Everything is made from a seed, from local files and what scikit-learn carries, into one folder. Models are trained here
where a case needs one; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.randomness import stable_seed

Row = dict[str, Any]

SIDE, SOURCE = 32, 900
"""Height and width of pictures in pixels, and how many of the digits a small model is pretrained on."""
EPOCHS, BATCH, RATE = 12, 32, 3e-3
SHIFTS = ("mix", "invert", "reverse", "permute")
"""Of the input: pixels mixed with their neighbours, black and white exchanged. Of the output: classes counted from the
other end, or dealt anew."""
INPUT = ("mix", "invert")


def rows(file: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(file: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


def drawn(found: Sequence[Row], count: int, *seed: Any) -> list[Row]:
    """`count` of the rows, in an order that follows from the seed; each text once."""
    distinct = list({row["text"]: row for row in found}.values())
    order = np.random.default_rng(stable_seed("rows", *seed)).permutation(len(distinct))
    return [distinct[index] for index in order[:count]]


def damaged(tuned: Path, block: int, strength: float, draw: int, to: Path) -> Path:
    """A model with noise on every matrix of one block: N(0, (strength times the matrix's own deviation)²)."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tuned, to, dirs_exist_ok=True)
    weights = load_file(to / "model.safetensors")
    dice = torch.Generator().manual_seed(stable_seed("noise", block, draw))
    for name in sorted(weights):
        matrix = weights[name]
        if f".layer.{block}." in name and matrix.dim() > 1:
            noise = torch.randn(matrix.shape, generator=dice) * (strength * matrix.std())
            weights[name] = (matrix + noise).contiguous()
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def text_recipe(model: str, train: str, batch_size: int, epochs: float, rate: float, seed: int, **data: str) -> Row:
    """A recipe for texts in JSON lines; paths start at the data root."""
    return {
        "model": model,
        "task": {"type": "text-classification", "max_length": 64},
        "data": {"path": "json", "data_files": {"train": train, **data}},
        "stages": [{"name": "all", "epochs": epochs, "learning_rate": rate}],
        "batch_size": batch_size,
        "seed": seed,
    }


def picture_recipe(model: str, folder: str, batch_size: int, epochs: float, rate: float, seed: int) -> Row:
    """A recipe for a folder of pictures."""
    return {
        "model": model,
        "task": "image-classification",
        "data": folder,
        "stages": [{"name": "all", "epochs": epochs, "learning_rate": rate}],
        "batch_size": batch_size,
        "seed": seed,
    }


def write_recipe(file: Path, recipe: Row) -> Path:
    """A recipe as a file; JSON is YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return file


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (digits, 8, 8) from 0 to 255 and what they show (digits,), in an order of their own."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(stable_seed("digits")).permutation(len(found.target))
    return (found.images[order] * 255 / 16).astype(np.uint8), found.target[order]


def pretrained(kind: str, to: Path) -> Path:
    """A small ResNet or ViT that tells ten digits apart; trained on `SOURCE` of them unless it is there already."""
    import torch
    import transformers
    from PIL import Image

    if to.exists():
        return to
    torch.manual_seed(stable_seed("pretraining", kind))
    model = _small(kind)
    # without torchvision the plain name is a stand-in that warns
    prepares = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor: Any = prepares(size={"height": SIDE, "width": SIDE})
    pictures, shown = digits()
    images = [Image.fromarray(picture).convert("RGB") for picture in pictures[:SOURCE]]
    pixels, labels = processor(images=images, return_tensors="pt")["pixel_values"], torch.tensor(shown[:SOURCE])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    partial = to.with_name(f".{to.name}-partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(to)
    return to


def _small(kind: str) -> Any:
    import transformers

    names = {digit: str(digit) for digit in range(10)}
    labels = {"id2label": names, "label2id": {name: digit for digit, name in names.items()}}
    if kind == "resnet":
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **labels))
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
    sizes |= {"image_size": SIDE, "patch_size": 8}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **labels))


def shifted(shift: str, count: int, draw: int, to: Path, skip: int = 0) -> Path:
    """`count` digits that no model was pretrained on, shifted, as a folder of pictures by class."""
    from PIL import Image

    pictures, shown = digits()
    rest = np.random.default_rng(stable_seed("target", draw)).permutation(np.arange(SOURCE, len(shown)))
    chosen = rest[skip : skip + count]
    dice = np.random.default_rng(stable_seed("shift", shift, draw))
    mixing, dealt = _mixing(dice), dice.permutation(10)
    for index in chosen:
        picture, digit = pictures[index], int(shown[index])
        if shift == "mix":
            picture = np.clip(mixing @ picture.reshape(-1).astype(float), 0, 255).astype(np.uint8).reshape(8, 8)
        if shift == "invert":
            picture = 255 - picture
        digit = {"reverse": 9 - digit, "permute": int(dealt[digit])}.get(shift, digit)
        (to / str(digit)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(to / str(digit) / f"{index:04}.png")
    return to


def _mixing(dice: np.random.Generator) -> np.ndarray:
    """(64, 64): every pixel keeps a fifth of itself and takes the rest from eight others."""
    mixing = 0.2 * np.eye(64)
    for pixel in range(64):
        mixing[pixel, dice.choice(64, 8, replace=False)] += dice.dirichlet(np.ones(8)) * 0.8
    return mixing
