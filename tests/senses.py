"""Small pictures, maps and recordings on disk, and the tiny models and processors that take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from PIL import Image
from scipy.io import wavfile
from torch import nn

from engine.randomness import stable_seed

RATE = 16_000
SPLITS = {"train": 24, "validation": 8}
COLORS = {"blue": 2, "green": 1, "red": 0}
TONES = {"high": 2_000.0, "low": 300.0}


def picture(name: str, index: int, side: int = 24) -> Image.Image:
    """Noise in which one channel is brighter than the others."""
    draw = np.random.default_rng(stable_seed(name, index))
    pixels = draw.integers(0, 120, (side, side, 3))
    pixels[..., COLORS[name]] += 100
    return Image.fromarray(pixels.astype(np.uint8))


def pictures(root: Path, splits: dict[str, int] = SPLITS) -> Path:
    """`root/<split>/<colour>/<number>.png`, so many pictures a split."""
    for split, count in splits.items():
        for index in range(count):
            name = sorted(COLORS)[index % 3]
            place = root / split / name / f"{split}-{index:03}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture(name, stable_seed(split, index)).save(place)
    return root


def tone(hertz: float, seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A tone in a little noise, as 16-bit samples."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(time))
    return ((0.5 * np.sin(2 * np.pi * hertz * time) + noise) * 32_767).astype(np.int16)


def tones(root: Path, splits: dict[str, int] = SPLITS, rate: int = 8_000) -> Path:
    """`root/<split>/<tone>/<number>.wav`, some longer than others."""
    for split, count in splits.items():
        for index in range(count):
            name = sorted(TONES)[index % 2]
            place = root / split / name / f"{split}-{index:03}.wav"
            place.parent.mkdir(parents=True, exist_ok=True)
            wavfile.write(place, rate, tone(TONES[name], 0.15 + 0.01 * (index % 4), rate, stable_seed(split, index)))
    return root


def save_picture_model(model: nn.Module, folder: Path, **settings: Any) -> Path:
    """The model and an image processor for it as a folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    size = {"height": tiny.IMAGE, "width": tiny.IMAGE}
    transformers.ViTImageProcessorPil(size=size, **settings).save_pretrained(folder)
    return folder


def wav2vec2(kind: str = "ForSequenceClassification", seed: int = 0, **config: Any) -> nn.Module:
    """A wav2vec 2.0 of 4 blocks of 16 that draws its masks as the real one does."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": tiny.BLOCKS, "conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4)}
    sizes |= {"conv_stride": (5, 8, 4), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8}
    sizes |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "vocab_size": 12, "pad_token_id": 0}
    sizes |= {"mask_time_length": 2, "mask_time_prob": 0.3, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
    config = transformers.Wav2Vec2Config(**(sizes | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"Wav2Vec2{kind}")(config)


def save_sound_model(model: nn.Module, folder: Path) -> Path:
    """The model and a feature extractor that masks padding, as a folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    return folder


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path
