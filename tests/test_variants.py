"""Text classification in every form that a recipe knows, each through a whole run.

And what plain transformers makes of the model that a run has saved, in a process that has never seen this engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
import transformers
from running import FROZEN, events, place, run, stage
from safetensors.torch import load_file
from torch import nn

from engine.learner import Learner
from engine.records import Evaluated, Proved, StageEnded, Step

REVIEWS = tiny.reviews(64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def relabelled(label: Any) -> list[dict[str, Any]]:
    """The reviews with what `label` makes of the number of each."""
    return [{"text": row["text"], "label": label(index)} for index, row in enumerate(REVIEWS)]


def quick(labels: int = 2) -> nn.Module:
    """A BERT whose first weights are large enough to learn from 48 rows, without dropout."""
    return tiny.bert(labels, initializer_range=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def folder(root: Path, rows: list[dict[str, Any]]) -> Path:
    return place(root, quick(), train=rows[:48], validation=rows[48:])


# What labels are


LABELS = {
    "names": (lambda index: ("good", "bad")[index % 2], "single_label_classification"),
    "ids": (lambda index: index % 2, "single_label_classification"),
    "sets": (lambda index: ["good", "long"] if index % 2 == 0 else ["bad"], "multi_label_classification"),
    "vectors": (lambda index: [index % 2, 1 - index % 2, 1], "multi_label_classification"),
    "numbers": (lambda index: index % 2 + 0.5, "regression"),
}
"""What makes a label of a number, and the kind of problem that this is."""


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_learnt_saved_and_proved(tmp_path: Path, kind: str) -> None:
    label, problem = LABELS[kind]
    training = {"logging_steps": 1}
    happened = run(folder(tmp_path, relabelled(label)), stages=[stage(epochs=4, learning_rate=3e-3)], training=training)
    assert events(happened, Evaluated)[-1].metrics["loss"] < 0.2 * events(happened, Step)[0].loss
    assert events(happened, Proved)[0].unmoved == ()
    config = json.loads((tmp_path / "runs/recipe/model/config.json").read_text())
    assert config["problem_type"] == problem


def test_pairs(tmp_path: Path) -> None:
    rows = [
        {"premise": row["text"], "hypothesis": "the film is good", "label": row["label"] == "good"} for row in REVIEWS
    ]
    happened = run(folder(tmp_path, rows), stages=[stage(epochs=8, learning_rate=3e-3)])
    assert events(happened, Evaluated)[-1].metrics["accuracy"] > 0.9


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "json"])
def test_files(tmp_path: Path, suffix: str) -> None:
    """The same rows in another format train the same model."""
    place(tmp_path)
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    for name, rows in (("train", REVIEWS[:48]), ("validation", REVIEWS[48:])):
        file = tmp_path / f"rows/{name}.{suffix}"
        if suffix == "csv":
            tiny.write_csv(file, rows)
        elif suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(file)
        elif suffix == "json":
            file.write_text(json.dumps(rows))
        else:
            tiny.write_jsonl(file, rows)
    losses = [event.loss for event in events(run(tmp_path), Step)]
    assert losses == [event.loss for event in events(run(place(tmp_path / "plain")), Step)]


# How it is trained and judged


def test_epochs_are_steps(tmp_path: Path) -> None:
    """48 rows in batches of 8 are 6 steps an epoch; half an epoch is 3."""
    place(tmp_path)
    ends = [
        events(run(tmp_path, stages=[{"name": "all", "learning_rate": 1e-3, **length}]), StageEnded)[0].step
        for length in ({"epochs": 2}, {"epochs": 0.5}, {"steps": 5})
    ]
    assert ends == [12, 3, 5]


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [6, 10]), (1, list(range(1, 11))), (4, [4, 8, 10]), (10, [10]), (99, [10])]
)
def test_evaluations_come_when_they_are_due(tmp_path: Path, every: int | None, steps: list[int]) -> None:
    evaluation = {"eval_steps": every} if every else {}
    happened = run(place(tmp_path), evaluation=evaluation, stages=[stage(steps=10)])
    assert [event.step for event in events(happened, Evaluated)] == steps


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "runs/recipe/model/model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_evaluation_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Judged after every step or once: the same dropout, the same weights, bit by bit."""
    place(tmp_path)
    stages = [stage(freeze="@blocks[:2]", steps=6, restore_best=False)]
    run(tmp_path, stages=stages)
    once = weights(tmp_path)
    run(tmp_path, stages=stages, evaluation={"eval_steps": 1, "batch_size": 3}, training={"logging_steps": 1})
    assert equal(weights(tmp_path), once)


def loss_of_saved(root: Path) -> float:
    """The loss of a run's saved model on its validation rows, by transformers alone."""
    folder = root / "runs/recipe/model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    prepares = transformers.AutoTokenizer.from_pretrained(folder)
    batch = prepares([row["text"] for row in REVIEWS[48:]], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[row["label"]] for row in REVIEWS[48:]])
    with torch.no_grad():
        return model(**batch, labels=labels).loss.item()


@pytest.mark.parametrize("best", [True, False])
def test_the_best_weights_of_a_stage_go_on(tmp_path: Path, best: bool) -> None:
    """At a rate far too high the loss goes up and down: what is saved is its lowest, or the last."""
    place(tmp_path)
    evaluation = {"metric": "loss", "eval_steps": 1}
    stages = [stage(steps=8, learning_rate=0.05, restore_best=best)]
    judged = events(run(tmp_path, stages=stages, evaluation=evaluation), Evaluated)
    losses = [event.metrics["loss"] for event in judged]
    assert min(losses) < losses[-1]
    assert [event.best for event in judged] == [loss < min([9e9, *losses[:i]]) for i, loss in enumerate(losses)]
    assert loss_of_saved(tmp_path) == pytest.approx(min(losses) if best else losses[-1], rel=1e-5)


def test_early_stopping_ends_a_stage(tmp_path: Path) -> None:
    stages = [stage(steps=50, learning_rate=0.05, early_stopping={"metric": "loss", "patience": 2})]
    happened = run(place(tmp_path), stages=stages, evaluation={"eval_steps": 1})
    losses = [event.metrics["loss"] for event in events(happened, Evaluated)]
    (ended,) = events(happened, StageEnded)
    assert ended.step == len(losses) < 50
    assert ended.reason == "no gain in loss for 2 evaluations"
    assert losses.index(min(losses)) == len(losses) - 3
    assert ended.metrics["loss"] == min(losses)


def test_metrics_that_are_asked_for_are_computed(tmp_path: Path) -> None:
    evaluation = {"metric": "f1", "metrics": ["matthews_correlation", "roc_auc"]}
    judged = events(run(place(tmp_path), evaluation=evaluation), Evaluated)
    assert list(judged[-1].metrics) == ["loss", "f1", "matthews_correlation", "roc_auc"]


def test_label_smoothing_raises_the_loss_and_leaves_the_judgement(tmp_path: Path) -> None:
    place(tmp_path, quick())
    stages = [stage(epochs=4, learning_rate=3e-3)]
    sharp, smooth = (run(tmp_path, stages=stages, training={"label_smoothing_factor": factor}) for factor in (0.0, 0.4))
    assert events(smooth, Step)[-1].loss > events(sharp, Step)[-1].loss + 0.1
    assert events(smooth, Evaluated)[-1].metrics["accuracy"] == 1.0


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_order_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    orders: list[list[int]] = []
    take = Learner._indices

    def watched(self: Learner, step: int) -> np.ndarray:
        indices = take(self, step)
        orders.append(indices.tolist())
        return indices

    monkeypatch.setattr(Learner, "_indices", watched)
    run(place(tmp_path), stages=[stage(epochs=2)], training={"train_sampling_strategy": strategy})
    epochs = [[*chain(*orders[:6])], [*chain(*orders[6:])]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(48))] * 2
    assert (epochs[0] == list(range(48))) is (strategy == "sequential")
    assert (epochs[0] == epochs[1]) is (strategy == "sequential")


def test_batches_in_parts_are_whole_batches(tmp_path: Path) -> None:
    """Without dropout, accumulation is the same sum in another order."""
    place(tmp_path, quick())
    run(tmp_path, training={"optim": "sgd"})
    whole = weights(tmp_path)
    run(tmp_path, training={"optim": "sgd"}, per_device_batch_size=3)
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=0)


def test_frozen_half_precision_and_trained_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    place(tmp_path)
    try:
        happened = run(tmp_path, model={"path": "model", "dtype": "bfloat16"}, freeze=FROZEN)
    finally:
        AcceleratorState._reset_state(True)
    kinds = {name: value.dtype for name, value in weights(tmp_path).items()}
    trained = {name for name in kinds if name.startswith(("classifier", "bert.pooler"))}
    assert {kinds[name] for name in trained} == {torch.float32}
    assert {kinds[name] for name in kinds if name not in trained} == {torch.bfloat16}
    assert events(happened, Proved)[0].moved == len(trained)


# What others make of the saved model


READER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]
    answers = [answer["label"] for answer in pipeline("text-classification", model=folder, device="cpu")(texts)]
    strays = [str(key) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[keys]]
    foreign = [name for name in ("engine", "peft") if name in sys.modules]
    print(json.dumps({"logits": logits, "answers": answers, "strays": strays + foreign}))
"""


def read_elsewhere(folders: list[Path], texts: list[str]) -> list[dict[str, Any]]:
    line = [sys.executable, "-c", READER, json.dumps(texts), *map(str, folders)]
    done = subprocess.run(line, cwd=folders[0], env=os.environ, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(said) for said in done.stdout.splitlines() if said.startswith("{")]


def own_logits(root: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], **keys: Any) -> list[list[float]]:
    """What the learner's own model says at the very end of its run, adapters that are kept still on it."""
    seen: list[list[float]] = []
    detach = Learner.detach

    def watched(self: Learner, how: str) -> None:
        self.model.eval()
        with torch.no_grad():
            seen[:] = [self.model(**self.processor(text, return_tensors="pt")).logits[0].tolist() for text in texts]
        detach(self, how)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "detach", watched)
        run(root, **keys)
    return seen


ADAPTED: dict[str, Any] = {
    "adapters": [{"type": "lora", "target_modules": ["query", "value"], "r": 4}],
    "freeze": "bert",
    "stages": [
        stage("head", steps=6),
        stage("top", unfreeze=["@blocks[-2:]", "@norms", "pooler"], steps=20, learning_rate=5e-3),
    ],
}
PLAIN: dict[str, Any] = {"freeze": FROZEN, "stages": [stage("head"), stage("top", unfreeze="@blocks[-1]", steps=12)]}


def test_saved_models_are_the_learners_in_a_clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights to the bit; adapters that were kept are merged, which rounds the last bit of float32 differently."""
    texts, runs = [row["text"] for row in REVIEWS[40:56]], {"plain": PLAIN, "adapted": ADAPTED}
    roots = {name: place(tmp_path / name, quick()) for name in runs}
    own = {name: own_logits(roots[name], monkeypatch, texts, **keys) for name, keys in runs.items()}
    read = read_elsewhere([tmp_path / name / "runs/recipe/model" for name in runs], texts)
    for name, found in zip(runs, read, strict=True):
        logits = np.array(own[name])
        apart = np.abs(np.array(found["logits"]) - logits).max() / np.abs(logits).max()
        assert apart <= (1e-6 if name == "adapted" else 0.0)
        assert found["answers"] == [("bad", "good")[index] for index in logits.argmax(axis=1)]
        assert found["strays"] == []
