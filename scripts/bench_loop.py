"""The price of a step: our loop against `transformers.Trainer` on the same work, in turns, in one process.

    python scripts/bench_loop.py [--rounds 7] [--steps 20] [--layers 6]

Both train all weights of the same BERT on the same random texts with fused AdamW, clipping and a linear schedule; the
time is the CPU time of the steps alone, loading and collating included. What counts is the ratio of a pair: a machine
that slows down slows both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from engine.data import Encoded, Split
from engine.learner import Learner
from engine.models import draft
from engine.recipe import Recipe
from engine.rows.batches import batching
from engine.tasks import Facts

BATCH, WIDTH, TOKENS = 16, 192, 32


def bert(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 6, "intermediate_size": 4 * WIDTH, "vocab_size": 2000}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            num_hidden_layers=layers, num_labels=6, problem_type="single_label_classification", **sizes
        )
    )


def texts(rows: int) -> Dataset:
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 2000, size=(rows, TOKENS)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": draw.integers(0, 6, size=rows).tolist()})


def stacked(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


class Ours:
    """Our loop, one stage, everything trainable."""

    def __init__(self, layers: int, rows: Dataset, steps: int):
        recipe = Recipe.model_validate(
            {
                "model": "none",
                "task": "text-classification",
                "data": "none",
                "stages": ({"name": "all", "steps": 10**6},),
                "training": {"train_sampling_strategy": "random"},
                "batch_size": BATCH,
                "cache": "off",
            }
        )
        with torch.device("meta"):
            plan, _ = draft(recipe, bert(layers), len(rows))
        data = Encoded(Split(rows), None, None, ())
        facts = Facts(tuple("abcdef"), "single_label_classification")
        type(recipe.task).collate = lambda _task, _processor: stacked
        spread = batching(BATCH, None, 1)
        self.learner = Learner(recipe, bert(layers), None, data, facts, Accelerator(cpu=True), spread)
        self.learner.enter(plan.stages[0])
        self.steps, self.done = steps, 0

    def __call__(self) -> float:
        began = time.process_time()
        for _ in range(self.steps):
            self.learner.step(self.done)
            self.done += 1
            if self.done % 10 == 0:
                self.learner.taken_loss()
        return time.process_time() - began


class Clock(TrainerCallback):
    """CPU time between the first step and the last."""

    def on_train_begin(self, *_args, **_kwargs):
        self.began = time.process_time()

    def on_train_end(self, *_args, **_kwargs):
        self.seconds = time.process_time() - self.began


class Theirs:
    """`Trainer` with its defaults, saving and reporting switched off."""

    def __init__(self, layers: int, rows: Dataset, steps: int):
        self.model, self.rows, self.steps = bert(layers), rows, steps
        self.folder = tempfile.mkdtemp()

    def __call__(self) -> float:
        arguments = TrainingArguments(
            self.folder,
            max_steps=self.steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            disable_tqdm=True,
            use_cpu=True,
        )
        clock = Clock()
        trainer = Trainer(self.model, arguments, train_dataset=self.rows, data_collator=stacked, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = texts(2000)
    theirs, ours = Theirs(asked.layers, rows, asked.steps), Ours(asked.layers, rows, asked.steps)
    theirs(), ours()
    ratios, mine, others = [], [], []
    for turn in range(asked.rounds):
        pair = (ours(), theirs()) if turn % 2 else (theirs(), ours())[::-1]
        mine.append(pair[0] / asked.steps * 1000)
        others.append(pair[1] / asked.steps * 1000)
        ratios.append(pair[0] / pair[1])
        print(f"round {turn + 1}: ours {mine[-1]:.1f} ms, Trainer {others[-1]:.1f} ms, ratio {ratios[-1]:.3f}")
    print(f"median step: ours {statistics.median(mine):.1f} ms CPU, Trainer {statistics.median(others):.1f} ms CPU")
    print(f"ratio: min {min(ratios):.3f}  median {statistics.median(ratios):.3f}  max {max(ratios):.3f}")


if __name__ == "__main__":
    main()
