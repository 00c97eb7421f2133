"""A language model trains as by `transformers.Trainer`, step by step: a mean over live tokens, however split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import tiny
from torch import nn

from engine.tasks import packing
from engine.tasks.text_generation import TextGeneration
from engine.tasks.texts import IGNORED

ROWS = 50


def model() -> nn.Module:
    return tiny.llama(initializer_range=0.1, use_cache=False)


def rows(packed: bool) -> dict[str, list[Any]]:
    """Texts of 3 to 40 tokens, of which a prompt of any length has no labels."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 320, size=draw.integers(3, 40)).tolist() for _ in range(ROWS)]
    given = [int(draw.integers(0, len(text) - 1)) for text in texts]
    pieces = [(text, [IGNORED] * n + text[n:]) for text, n in zip(texts, given, strict=True)]
    if not packed:
        return {"input_ids": texts, "labels": [labels for _, labels in pieces]}
    pairs = [packing.joined(pieces[at : at + 2]) for at in range(0, ROWS, 2)]
    return {name: [pair[name] for pair in pairs] for name in pairs[0]}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_stage_is_the_trainer(tmp_path: Path, accumulation: int, smoothing: float, packed: bool) -> None:
    task = TextGeneration.model_validate({"type": "text-generation"})
    case = parity.Case("text-generation", model, rows(packed), task.collate(tiny.byte_level()), divides=True)
    parity.same(case, tmp_path, accumulation, {**parity.TRAINING, "label_smoothing_factor": smoothing})
