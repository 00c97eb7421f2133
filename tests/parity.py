"""One stage trained twice, by the engine and by `transformers.Trainer`: the same rows in the same order, the same step.

A case says what is trained; the helpers train it without dropout on the CPU and hand back each step's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from engine.data import Encoded, Split
from engine.learner import Learner
from engine.models import draft
from engine.recipe import Recipe
from engine.rows.batches import batching
from engine.tasks import Facts

BATCH, EPOCHS = 16, 3
TRAINING = {
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 0.2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.0,
}

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    task: str
    model: Callable[[], nn.Module]
    """Makes the same model each time, without dropout."""
    rows: Mapping[str, list[Any]]
    """Encoded rows, by column."""
    collate: Collate
    facts: Facts = field(default_factory=Facts)
    loss: Callable[..., torch.Tensor] | None = None
    """Trainer's `compute_loss_func`, where its own division of a loss over micro-batches isn't by live labels."""
    divides: bool = False
    """Whether the model divides its loss by the items of the whole step that Trainer tells it, as decoders do."""

    @property
    def size(self) -> int:
        return len(next(iter(self.rows.values())))


def ours(case: Case, accumulation: int, training: Mapping[str, Any]) -> tuple[list[float], list[list[int]], nn.Module]:
    """Each step's loss, the examples of each step in order, and the model after the stage."""
    recipe = Recipe.model_validate(
        {
            "model": "tiny",
            "task": case.task,
            "data": "none",
            "stages": ({"name": "all", "epochs": EPOCHS},),
            "training": dict(training),
            "batch_size": BATCH,
            "per_device_batch_size": BATCH // accumulation,
        }
    )
    with torch.device("meta"):
        bones = case.model()
    plan, _ = draft(recipe, bones, case.size)
    data = Encoded(Split(Dataset.from_dict(dict(case.rows))), None, None, ())
    object.__setattr__(recipe.task, "collate", lambda _processor: case.collate)
    spread = batching(BATCH, BATCH // accumulation, 1)
    learner = Learner(recipe, case.model(), None, data, case.facts, Accelerator(cpu=True), spread)
    (stage,) = plan.stages
    learner.enter(stage)
    losses, order = [], []
    for step in range(stage.steps):
        order.append(learner._indices(step).tolist())
        learner.step(step)
        losses.append(learner.taken_loss())
    learner.leave()
    return losses, order, learner.model


class _Epochs:
    """A data loader that gives each epoch the order it had elsewhere."""

    def __init__(self, rows: Dataset, collate: Collate, size: int, epochs: Sequence[Sequence[int]]):
        self.dataset, self.batch_size = rows, size
        self._collate, self._epochs, self._turn = collate, epochs, -1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._turn += 1
        order: Any = self._epochs[self._turn]  # any sequence of indices serves as a sampler
        return iter(DataLoader(self.dataset, batch_size=self.batch_size, sampler=order, collate_fn=self._collate))

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)


def theirs(
    case: Case, folder: Path, accumulation: int, training: Mapping[str, Any], order: Sequence[Sequence[int]]
) -> tuple[list[float], nn.Module]:
    """Each step's loss by Trainer on the same examples, and its model."""
    each = len(order) // EPOCHS
    epochs = [[i for step in order[start : start + each] for i in step] for start in range(0, len(order), each)]

    class Same(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return _Epochs(self.train_dataset, case.collate, BATCH // accumulation, epochs)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=EPOCHS,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        optim="adamw_torch",
        **training,
    )
    rows = Dataset.from_dict(dict(case.rows))
    trainer = Same(case.model(), arguments, train_dataset=rows, data_collator=case.collate, compute_loss_func=case.loss)
    # BERT takes any keyword and so seems to know how to divide a loss by the items of a whole step, but its head
    # ignores the number: left to itself, Trainer 5.23 would sum the micro-batches' means and train four times as fast.
    trainer.model_accepts_loss_kwargs = case.divides
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def same(case: Case, folder: Path, accumulation: int, training: Mapping[str, Any], close: float = 1e-5) -> None:
    """Assert that both take the same steps: losses within `close`, weights after the stage within 2e-4."""
    mine, order, my_model = ours(case, accumulation, training)
    reference, their_model = theirs(case, folder, accumulation, training, order)
    assert len(mine) == len(reference) == EPOCHS * -(-case.size // BATCH)
    assert mine == pytest.approx(reference, abs=close)
    for (name, mine_), (_, theirs_) in zip(my_model.named_parameters(), their_model.named_parameters(), strict=True):
        torch.testing.assert_close(mine_, theirs_, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
