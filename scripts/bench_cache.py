"""What the frost line saves: a step recomputed, replayed, and the bare layers above the line, in turns, in one process.

    python scripts/bench_cache.py [--rounds 5] [--layers 6] [--width 384] [--examples 400]

A BERT of MiniLM's size on random texts of 8 to 64 tokens; head alone, then the top one, two and half of the layers.
Times are CPU times of one thread, medians over the batches of all rounds. `floor` is the trained layers called by hand
on tensors that are in memory already: no replay can be faster. `stage` is five epochs with an evaluation of a quarter
of the rows after each, as recomputed over as replayed, capture included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from engine import freezing
from engine.frost.prefix import Cache, Prefix
from engine.frost.replay import Line
from engine.frostline import find

BATCH = 16


class Texts:
    """Random token sequences and labels."""

    fingerprint = "random"

    def __init__(self, count: int):
        draw = np.random.default_rng(0)
        self.lengths = draw.integers(8, 65, count)
        self.rows = [(draw.integers(1, 2000, length).tolist(), int(draw.integers(6))) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def examples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"input_ids": self.rows[index][0], "labels": self.rows[index][1]} for index in indices]


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(each["input_ids"]) for each in examples)
    tokens = [each["input_ids"] + [0] * (longest - len(each["input_ids"])) for each in examples]
    ids = torch.tensor(tokens)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def bert(layers: int, width: int, trained: int) -> nn.Module:
    """A BERT whose pooler, classifier and top `trained` layers train."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": 12, "intermediate_size": 4 * width, "vocab_size": 2000}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(num_hidden_layers=layers, num_labels=6, **sizes)
    )
    top = [f"bert.encoder.layer.{layers - 1 - place}." for place in range(trained)]
    above = ("bert.pooler.", "classifier.", *top)
    freezing.obey(model, {name for name, _ in model.named_parameters() if name.startswith(above)})
    return model


class Stage:
    """One depth of training and the ways to take a step of it."""

    def __init__(self, model: nn.Module, line: Line, kept: Prefix, source: Texts, trained: int):
        self.model, self.line, self.kept, self.source, self.trained = model, line, kept, source, trained
        self.parameters = list(freezing.trainable(model).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def full(self, indices: Sequence[int]) -> Tensor:
        return self.model(**collate(self.source.examples(indices))).loss

    def replayed(self, indices: Sequence[int]) -> Tensor:
        batch = collate(self.source.examples(indices))
        with self.line.replaying():
            self.kept.feed(indices, batch)
            return self.model(**batch).loss

    def floor(self, indices: Sequence[int]) -> Callable[[], Tensor]:
        """The layers above the line on tensors in memory; what is returned does the work."""
        batch = collate(self.source.examples(indices))
        (hidden,) = self.kept.tensors(indices, batch)
        mask = batch["attention_mask"][:, None, None, :].bool()

        def work() -> Tensor:
            above = hidden
            for layer in self.model.bert.encoder.layer[len(self.model.bert.encoder.layer) - self.trained :]:
                above = layer(above, attention_mask=mask)
            logits = self.model.classifier(self.model.dropout(self.model.bert.pooler(above)))
            return nn.functional.cross_entropy(logits, batch["labels"])

        return work

    def step(self, loss: Callable[[], Tensor]) -> float:
        """CPU milliseconds of one training step."""
        began = time.process_time()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 1000 * (time.process_time() - began)

    def look(self, loss: Callable[[], Tensor]) -> float:
        """CPU milliseconds of one evaluation batch."""
        began = time.process_time()
        with freezing.eval_mode(self.model):
            loss()
        return 1000 * (time.process_time() - began)


def measure(stage: Stage, rounds: int) -> dict[str, float]:
    """Medians over rounds of batches; the ways take turns, forwards and backwards."""
    draw, found = np.random.default_rng(1), {key: [] for key in ("full", "kept", "floor", "full eval", "kept eval")}
    for turn in range(rounds * 4):
        some = draw.choice(len(stage.source), BATCH, replace=False).tolist()
        bare = stage.floor(some)
        ways = {
            "full": lambda some=some: stage.step(lambda: stage.full(some)),
            "kept": lambda some=some: stage.step(lambda: stage.replayed(some)),
            "floor": lambda bare=bare: stage.step(bare),
            "full eval": lambda some=some: stage.look(lambda: stage.full(some)),
            "kept eval": lambda some=some: stage.look(lambda: stage.replayed(some)),
        }
        stage.line.train_mode()
        for key in list(ways)[:: 1 if turn % 2 else -1]:
            spent = ways[key]()
            if turn >= 2:
                found[key].append(spent)
    return {key: statistics.median(times) for key, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 5), ("layers", 6), ("width", 384), ("examples", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    source = Texts(asked.examples)
    print(
        "trained   full  replayed  floor   step  over floor   eval   capture/example  kept/example  stage  replay off"
    )
    for trained in (0, 1, 2, asked.layers // 2):
        model = bert(asked.layers, asked.width, trained)
        line = find(model, collate(source.examples([0, 1])))
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            kept = Prefix.open(line, source, collate, Cache(Path(folder) / "kept"))
            capture = 1000 * (time.process_time() - began) / len(source)
            took = measure(Stage(model, line, kept, source, trained), asked.rounds)
            whole, steps = 1.25 * len(source), len(source) / BATCH
            full, replayed = (5 * steps * (took[way] + took[f"{way} eval"] / 4) for way in ("full", "kept"))
            off, size = kept.difference.gradient, kept.size / len(source)
            print(
                f"{trained:>7} {took['full']:>6.1f} {took['kept']:>9.1f} {took['floor']:>6.1f} "
                f"{took['full'] / took['kept']:>5.1f}x {took['kept'] / took['floor']:>10.2f}x "
                f"{took['full eval'] / took['kept eval']:>5.1f}x {capture:>13.2f} ms {size:>11.0f} B "
                f"{full / (replayed + capture * whole):>5.1f}x {off:>10.1e}"
            )


if __name__ == "__main__":
    main()
