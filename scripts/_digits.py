"""The pictures of recipes/digits.yaml, and a small model that has seen others of their kind.

scikit-learn carries 1,797 handwritten digits of 8 x 8 pixels (Alpaydin & Kaynak 1998). A ResNet of 80,000 weights is
pretrained on the digits 0 to 4; what is left to fine-tune it on are twenty pictures each of 5 to 9. Reads an installed
package and no network; draws from a fixed seed.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN = 5
"""Digits below this one are pretrained on."""
SIZES = {"train": 20, "validation": 40}
"""Pictures of each class in a split; what is left is the test split."""
SIDE = 32
"""Height and width of the pictures that the model takes, in pixels."""
EPOCHS, BATCH, RATE, SEED = 12, 32, 3e-3, 13


def prepare(folder: Path) -> None:
    """`<folder>/digits/<split>/<name>/<number>.png` and the model `<folder>/models/digits`, unless they are there."""
    for place, make in ((folder / "digits", _write_pictures), (folder / "models/digits", _pretrain)):
        if not place.is_dir():
            partial = place.with_name(f".{place.name}-{os.getpid()}")
            partial.mkdir(parents=True)
            make(partial)
            with suppress(OSError):  # another process was as quick
                partial.rename(place)
            shutil.rmtree(partial, ignore_errors=True)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (digits, 8, 8) from 0 to 255 and what they show (digits,)."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return (found.images * 255 / 16).astype(np.uint8), found.target


def _write_pictures(folder: Path) -> None:
    from PIL import Image

    pictures, shown = _digits()
    for digit in range(SEEN, len(NAMES)):
        drawn = np.random.default_rng([SEED, digit]).permutation(np.flatnonzero(shown == digit))
        ends = np.cumsum(list(SIZES.values()))
        for split, indices in zip((*SIZES, "test"), np.split(drawn, ends), strict=True):
            (place := folder / split / NAMES[digit]).mkdir(parents=True)
            for index in indices:
                Image.fromarray(pictures[index]).save(place / f"{index:04}.png")


def _pretrain(folder: Path) -> None:
    """A ResNet that tells the digits 0 to 4 apart, and the image processor that goes with it."""
    import torch
    from PIL import Image
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    torch.manual_seed(SEED)
    names = dict(enumerate(NAMES[:SEEN]))
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, id2label=names, label2id={name: digit for digit, name in names.items()})
    model = ResNetForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pictures, shown = _digits()
    seen = shown < SEEN
    images = [Image.fromarray(picture).convert("RGB") for picture in pictures[seen]]
    pixels, labels = processor(images=images, return_tensors="pt")["pixel_values"], torch.tensor(shown[seen])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    prepare(Path(__file__).parent.parent / "data")
