"""One stage with everything trainable is `transformers.Trainer`: the same losses, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from parity import TRAINING, Case, same
from torch import nn
from torch.nn.functional import cross_entropy

from engine.tasks import Facts

ROWS = 52
LABELS = 3


def bert(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    still = {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **still, num_labels=LABELS)
    return getattr(transformers, kind)(config)


def rows(label_each_token: bool = False) -> dict[str, list[Any]]:
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 60, size=draw.integers(3, 14)).tolist() for _ in range(ROWS)]
    labels: list[Any] = draw.integers(0, LABELS, size=ROWS).tolist()
    if label_each_token:
        labels = [np.where(draw.random(len(t)) < 0.4, -100, draw.integers(0, LABELS, len(t))).tolist() for t in texts]
    return {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts], "labels": labels}


def pad(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as a tokenizer pads it; labels of tokens are padded with the one that is ignored."""
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor(
            [
                value + [fill[key]] * (width - len(value)) if isinstance(value := example[key], list) else value
                for example in examples
            ]
        )
        for key in fill
    }


def over_the_step(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """The loss of a micro-batch as its share of the mean over all live labels of the step."""
    logits = outputs["logits"]
    total = cross_entropy(logits.view(-1, LABELS), labels.view(-1), reduction="sum", ignore_index=-100)
    return total / num_items_in_batch


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_text_classification(tmp_path: Path, accumulation: int, smoothing: float) -> None:
    facts = Facts(("a", "b", "c"), "single_label_classification")
    case = Case("text-classification", lambda: bert("BertForSequenceClassification"), rows(), pad, facts)
    same(case, tmp_path, accumulation, TRAINING | {"label_smoothing_factor": smoothing})


@pytest.mark.parametrize(("accumulation", "smoothing"), [(1, 0.0), (1, 0.1), (4, 0.0)])
def test_token_classification(tmp_path: Path, accumulation: int, smoothing: float) -> None:
    """Micro-batches count by their live labels; Trainer is told so, but smooths within each and weighs them alike."""
    loss = over_the_step if accumulation > 1 else None
    facts = Facts(("a", "b", "c"), form="ids")
    case = Case("token-classification", lambda: bert("BertForTokenClassification"), rows(True), pad, facts, loss)
    same(case, tmp_path, accumulation, TRAINING | {"label_smoothing_factor": smoothing})
