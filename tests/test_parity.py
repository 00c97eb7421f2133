"""One stage with everything trainable is `transformers.Trainer`: the same losses, step by step."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import Sampler

from engine.batches import batching
from engine.data import Encoded, Split
from engine.learner import Learner
from engine.models import draft
from engine.recipe import Recipe
from engine.tasks import Facts

ROWS, BATCH, EPOCHS = 52, 16, 3
TRAINING = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 0.2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.0,
}


def tiny_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        problem_type="single_label_classification",
    )
    return transformers.BertForSequenceClassification(config)


def rows():
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 60, size=draw.integers(3, 14)).tolist() for _ in range(ROWS)]
    return {
        "input_ids": texts,
        "attention_mask": [[1] * len(text) for text in texts],
        "labels": draw.integers(0, 3, size=ROWS).tolist(),
    }


class Padder:
    """A tokenizer as far as padding goes."""

    def __call__(self, examples):
        width = max(len(example["input_ids"]) for example in examples)
        padded = {
            key: torch.tensor([example[key] + [0] * (width - len(example[key])) for example in examples])
            for key in ("input_ids", "attention_mask")
        }
        return padded | {"labels": torch.tensor([example["labels"] for example in examples])}


def ours(tmp_path, accumulation, training):
    recipe = Recipe.model_validate(
        {
            "model": "tiny",
            "task": "text-classification",
            "data": "none",
            "stages": ({"name": "all", "epochs": EPOCHS},),
            "training": training,
            "batch_size": BATCH,
            "per_device_batch_size": BATCH // accumulation,
        }
    )
    with torch.device("meta"):
        bones = tiny_bert()
    plan, _ = draft(recipe, bones, ROWS)
    data = Encoded(Split(Dataset.from_dict(rows())), None, None, ())
    facts = Facts(("a", "b", "c"), "single_label_classification")
    spread = batching(BATCH, BATCH // accumulation, 1)
    learner = Learner.__new__(Learner)
    object.__setattr__(recipe.task, "collate", lambda _processor: Padder())
    learner.__init__(recipe, tiny_bert(), None, data, facts, Accelerator(cpu=True), spread)
    (stage,) = plan.stages
    learner.enter(stage)
    losses, order = [], []
    for step in range(stage.steps):
        order.append(learner._indices(step).tolist())
        learner.step(step)
        losses.append(learner.taken_loss())
    learner.leave()
    return losses, order, learner.model


class InOrder(Sampler):
    def __init__(self, order):
        self.order = order

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class Epochs:
    """A loader with an order of its own for each epoch."""

    def __init__(self, dataset, batch_size, orders):
        self.dataset, self.batch_size = dataset, batch_size
        self.orders = iter(orders)

    def __iter__(self):
        sampler = InOrder(next(self.orders))
        loader = torch.utils.data.DataLoader
        return iter(loader(self.dataset, batch_size=self.batch_size, sampler=sampler, collate_fn=Padder()))

    def __len__(self):
        return -(-ROWS // self.batch_size)


def theirs(tmp_path: Path, accumulation, training, order):
    per_epoch = len(order) // EPOCHS
    epochs = [list(chain(*order[epoch * per_epoch : (epoch + 1) * per_epoch])) for epoch in range(EPOCHS)]

    class Same(transformers.Trainer):
        def get_train_dataloader(self):
            return Epochs(self.train_dataset, self.args.per_device_train_batch_size, epochs)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=EPOCHS,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **training,
    )
    trainer = Same(tiny_bert(), arguments, train_dataset=Dataset.from_dict(rows()), data_collator=Padder())
    # BERT takes any keyword and so seems to know how to divide a loss by the items of a whole step, but its head
    # ignores the number: left to itself, Trainer 5.23 would sum the micro-batches' means and train four times as fast.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.model


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_stage_is_the_trainer(tmp_path, accumulation, smoothing, capsys):
    training = TRAINING | {"label_smoothing_factor": smoothing}
    mine, order, my_model = ours(tmp_path, accumulation, training)
    reference, their_model = theirs(tmp_path, accumulation, training, order)
    assert len(mine) == len(reference) == EPOCHS * -(-ROWS // BATCH)
    assert mine == pytest.approx(reference, abs=1e-5)
    for (name, mine_), (_, theirs_) in zip(my_model.named_parameters(), their_model.named_parameters(), strict=True):
        torch.testing.assert_close(mine_, theirs_, atol=2e-4, rtol=0, msg=name)
