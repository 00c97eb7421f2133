"""Pictures, answers, written texts and speech train as by `transformers.Trainer`, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import senses
import tiny
import torch
from parity import TRAINING, Case, same
from torch import nn
from torch.nn.functional import cross_entropy

from engine.tasks import Facts

ROWS, LABELS = 52, 3
STEADY = TRAINING | {"adam_epsilon": 1e-6}
"""Adam would make steps of what is rounding alone, such as the gradient of a bias that softmax can't see."""
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def stack(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of examples of one size."""
    return {key: torch.as_tensor(np.array([example[key] for example in examples])) for key in examples[0]}


def pad(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of texts, and of labels that are texts."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    width = {key: max(len(example[key]) for example in examples) for key in fill}
    return {
        key: torch.tensor([example[key] + [fill[key]] * (width[key] - len(example[key])) for example in examples])
        for key in fill
    }


def images() -> Case:
    def vit() -> nn.Module:
        return tiny.vit(LABELS, initializer_range=0.1)

    pixels = draw().normal(size=(ROWS, 3, tiny.IMAGE, tiny.IMAGE)).astype(np.float32)
    rows = {"pixel_values": pixels.tolist(), "labels": draw().integers(0, LABELS, ROWS).tolist()}

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = stack(examples)
        return {**batch, "pixel_values": batch["pixel_values"].float()}

    facts = Facts(("a", "b", "c"), "single_label_classification")
    return Case("image-classification", vit, rows, collate, facts)


def answers() -> Case:
    """Windows of one length: padding takes part in the loss of the model itself, and in ours it doesn't."""

    def bert() -> nn.Module:
        return tiny.bert(kind="BertForQuestionAnswering", initializer_range=0.1, **STILL)

    texts = draw().integers(5, tiny.VOCABULARY, (ROWS, 14))
    spans = np.sort(draw().integers(1, 13, (ROWS, 2)))
    rows = {"input_ids": texts.tolist(), "attention_mask": np.ones_like(texts).tolist()}
    rows |= {"start_positions": spans[:, 0].tolist(), "end_positions": spans[:, 1].tolist()}
    return Case("question-answering", bert, rows, stack)


def summaries(accumulation: int) -> Case:
    def t5() -> nn.Module:
        return tiny.t5(dropout_rate=0.0)

    lengths = draw().integers(3, 20, (ROWS, 2))
    texts, summed = ([draw().integers(3, 320, size=n).tolist() for n in lengths[:, side]] for side in (0, 1))
    rows = {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts], "labels": summed}

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """With what the decoder reads, for Trainer takes the labels away where it has a loss of its own."""
        batch = pad(examples)
        read = torch.roll(batch["labels"].masked_fill(batch["labels"] < 0, 0), 1, 1)
        read[:, 0] = 0
        return {**batch, "decoder_input_ids": read}

    def over_the_step(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        logits = outputs["logits"]
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        return total / num_items_in_batch

    return Case("summarization", t5, rows, collate, loss=over_the_step if accumulation > 1 else None)


def speech() -> Case:
    def wav2vec2() -> nn.Module:
        still = dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"), 0.0)
        still |= {"activation_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0}
        return senses.wav2vec2("ForCTC", ctc_loss_reduction="mean", **still)

    sounds = draw().normal(size=(ROWS, 3200)).astype(np.float32)
    said = [draw().integers(1, 12, size=n).tolist() for n in draw().integers(2, 6, ROWS)]
    rows = {"input_values": sounds.tolist(), "labels": said}

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(example["labels"]) for example in examples)
        labels = [example["labels"] + [-100] * (width - len(example["labels"])) for example in examples]
        sounds = torch.tensor([example["input_values"] for example in examples])
        return {"input_values": sounds, "attention_mask": torch.ones_like(sounds, dtype=torch.long),
                "labels": torch.tensor(labels)}  # fmt: skip

    return Case("automatic-speech-recognition", wav2vec2, rows, collate)


CASES = {
    "image-classification": lambda accumulation: images(),
    "question-answering": lambda accumulation: answers(),
    "summarization": summaries,
    "automatic-speech-recognition": lambda accumulation: speech(),
}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("task", CASES)
def test_one_stage_is_the_trainer(tmp_path: Path, task: str, accumulation: int) -> None:
    same(CASES[task](accumulation), tmp_path, accumulation, STEADY)
