"""Mistakes that other trainers pass over in silence, planted one by one, on the path that a command takes.

Each is refused before the first step or stopped by the second, in one sentence, with the exit code of its kind.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import senses
import tiny
import torch
import transformers
from datasets import ClassLabel, Features, Value
from running import FROZEN, draft, events, place, recipe, refused, run, stage, stopped
from safetensors.torch import load_file
from torch import nn

from engine import models
from engine.errors import GUARD, REFUSED, PlanError
from engine.records import Proved, StageStarted, Step


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    line = [sys.executable, "-m", "engine.cli", *words, "--data-root", str(root)]
    folder = Path(__file__).parent.parent
    return subprocess.run(line, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120)


# Patterns that do nothing


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"freeze": "encoder.layers"}, ("freeze", 0), "`encoder.layers` names no module of this model; near: "),
        ({"freeze": ["@blocks", "embedings"]}, ("freeze", 1), "`embedings` names no module of this model; near: "),
        ({"freeze": ["layer.[0-11]"]}, ("freeze", 0), "`[0-11]`"),
        (
            {"stages": [stage(freeze="layer.0", unfreeze="@blocks")]},
            ("stages", 0, "freeze", 0),
            "`layer.0` does nothing: the last word on all of it is `@blocks`",
        ),
        ({"freeze": ["bert", "encoder"]}, ("freeze", 1), "`encoder` freezes nothing: all of it is frozen already"),
        (
            {"freeze": "@embeddings", "stages": [stage(unfreeze="pooler")]},
            ("stages", 0, "unfreeze", 0),
            "`pooler` unfreezes nothing: it is all open already",
        ),
        ({"freeze": ["bert", "classifier"]}, ("stages", 0), "stage `all` trains nothing"),
        (
            {"freeze": "@blocks", "adapters": [{"type": "lora", "target_modules": "query"}]},
            ("adapters", 0, "target_modules", 0),
            "`query` lies in a part that no stage unfreezes, so its adapters would never train",
        ),
        (
            {"freeze": "@blocks", "stages": [stage(learning_rate={"layer.0": 1e-3})]},
            ("stages", 0, "learning_rate", "layer.0"),
            "`layer.0` sets the rate of nothing that trains",
        ),
    ],
    ids=[
        *("no-such-module", "one-of-two-is-none", "a-range-in-brackets", "overruled", "frozen-already", "open-already"),
        *("all-frozen", "adapters-on-what-is-frozen", "a-rate-of-nothing"),
    ],
)
def test_patterns_that_do_nothing(tmp_path: Path, keys: dict[str, Any], key: tuple[str | int, ...], said: str) -> None:
    found, sentence = refused(place(tmp_path), **keys)
    assert found == key
    assert said in sentence


def test_a_command_tells_where(tmp_path: Path) -> None:
    written = recipe(place(tmp_path), freeze=["@blocks", "embedings"])
    line = next(number for number, text in enumerate(written.read_text().splitlines(), 1) if "embedings" in text)
    done = command(tmp_path, "run", str(written))
    assert done.returncode == REFUSED
    assert done.stderr.startswith(f"{written}:{line}:")
    assert len(done.stderr.splitlines()) == 1


# Weights that nobody trains


def test_random_head_that_no_stage_trains(tmp_path: Path) -> None:
    place(tmp_path)
    tiny.bert().bert.save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError) as caught:
        run(tmp_path, freeze=["@embeddings", "classifier"])
    (problem,) = caught.value.problems
    assert problem.key == ("freeze",)
    assert "`classifier.bias` starts at random" in problem.sentence
    assert "no stage trains it" in problem.sentence


def test_pooler_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    place(tmp_path)
    transformers.BertModel(tiny.bert().config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=r"`bert.pooler.dense.bias` starts at random") as caught:
        run(tmp_path, freeze="bert")
    assert caught.value.exit_code == REFUSED
    proved = events(run(tmp_path, freeze=FROZEN), Proved)[0]
    assert (proved.moved, proved.unmoved) == (4, ())


def test_weight_that_the_loss_does_not_reach(tmp_path: Path) -> None:
    """XLNet's `mask_emb` serves its pretraining alone: as a weight to train it would only cost memory."""
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": tiny.VOCABULARY}
    config = transformers.XLNetConfig(**sizes, num_labels=2, pad_token_id=0)
    sentence, code, happened = stopped(place(tmp_path, transformers.XLNetForSequenceClassification(config)))
    assert "`transformer.mask_emb` should train, but the loss doesn't depend on it" in sentence
    assert code == GUARD
    assert not events(happened, StageStarted)


# Labels


def test_labels_out_of_range(tmp_path: Path) -> None:
    place(tmp_path)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = [{"text": f"film {index}", "label": index % 2} for index in range(20)]
    for name in ("train", "validation"):
        (tmp_path / f"rows/{name}.jsonl").unlink()
        table = datasets.Dataset.from_list(rows, features=features).data.table
        column = table.column("label").to_pylist()
        column[3] = 2
        table = table.set_column(1, table.schema.field(1), [column])
        datasets.Dataset(table).to_parquet(tmp_path / f"rows/{name}.parquet")
    key, sentence = refused_by_data(tmp_path)
    assert key == ("data", "columns", "label")
    assert "`label` is 2, but there are 2 classes, 0 to 1" in sentence
    assert "train.parquet, row 4" in sentence


def refused_by_data(root: Path, **keys: Any) -> tuple[tuple[str | int, ...], str]:
    """The first problem for which a run is refused: one for each split, say."""
    with pytest.raises(PlanError) as caught:
        run(root, **keys)
    assert caught.value.exit_code == REFUSED
    return caught.value.problems[0].key, caught.value.problems[0].sentence


def test_every_label_ignored(tmp_path: Path) -> None:
    rows = [{"text": f"film {index}", "label": -100} for index in range(20)]
    key, sentence = refused_by_data(place(tmp_path, train=rows, validation=rows))
    assert key == ("data", "columns", "label")
    assert "every label is -100, which the loss ignores" in sentence


def test_metric_that_is_no_number(tmp_path: Path) -> None:
    """Accuracy would look fine on a validation split of one class; what ranks the classes has nothing to rank."""
    good = [row for row in tiny.reviews(64) if row["label"] == "good"]
    place(tmp_path, validation=good[24:])
    sentence, code, happened = stopped(tmp_path, evaluation={"metric": "roc_auc", "eval_steps": 1})
    assert sentence == "stage `all`, step 1: `roc_auc` is nan, so nothing can be best; look at the validation rows"
    assert code == GUARD
    assert [event.step for event in events(happened, Step)] == [1]
    assert not (tmp_path / "runs/recipe/model").exists()


# One tensor, two wishes


def test_tied_weights_asked_for_in_two_ways(tmp_path: Path) -> None:
    place(tmp_path, tiny.gpt2(), *([{"text": row["text"]} for row in tiny.reviews(count)] for count in (48, 16)))
    key, sentence = refused(tmp_path, task={"type": "text-generation", "max_length": 16}, freeze=["lm_head"])
    assert key == ("freeze", 0)
    assert sentence.startswith("`lm_head.weight` and `transformer.wte.weight` are one tensor (tied weights)")


# Frozen things that move


Plant = Callable[[Callable[[nn.Module], None]], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Does something to every model that is loaded from here on."""

    def planted(change: Callable[[nn.Module], None]) -> None:
        load = models.load

        def changed(*arguments: Any) -> models.Loaded:
            loaded = load(*arguments)
            change(loaded.model)
            return loaded

        monkeypatch.setattr(models, "load", changed)

    return planted


def mover(tensor: Callable[[nn.Module], torch.Tensor], after: int) -> Callable[[nn.Module], None]:
    """Moves a tensor of the model in its forward passes, from number `after` on."""

    def change(model: nn.Module) -> None:
        passes = iter(range(10**6))

        def move(*_: Any) -> None:
            if next(passes) >= after:
                tensor(model).data.add_(1)

        model.register_forward_pre_hook(move)

    return change


TENSORS = {
    "bert.embeddings.position_ids": lambda model: model.bert.embeddings.position_ids,
    "bert.encoder.layer.0.output.dense.weight": lambda model: model.bert.encoder.layer[0].output.dense.weight,
}
"""A frozen buffer and a frozen weight."""


@pytest.mark.parametrize("name", TENSORS)
def test_frozen_tensor_that_moves_at_once(tmp_path: Path, plant: Plant, name: str) -> None:
    plant(mover(lambda model: _outside_positions(TENSORS[name](model)), after=0))
    sentence, code, happened = stopped(place(tmp_path), freeze=FROZEN)
    assert sentence == f"stage `all`: a trial step moved `{name}`, which is frozen; don't use this model"
    assert code == GUARD
    assert not events(happened, Step)


def _outside_positions(tensor: torch.Tensor) -> torch.Tensor:
    """Of the positions only the last, which no short text reaches: the pass itself goes on as before."""
    return tensor[:, -1:] if tensor.dtype == torch.long else tensor


def test_frozen_tensor_that_moves_late(tmp_path: Path, plant: Plant) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    plant(mover(TENSORS[name], after=6))
    sentence, code, happened = stopped(place(tmp_path), freeze=FROZEN)
    assert sentence == f"the run moved `{name}`, which is frozen; don't use this model"
    assert code == GUARD
    assert not events(happened, Proved)


def running_statistics(folder: Path) -> dict[str, torch.Tensor]:
    """What the BatchNorms of a saved model know of the past, in stages 0 to 3 and before them."""
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if "running_" in name}


def test_batchnorm_below_the_frost_line_counts_no_further(tmp_path: Path) -> None:
    """A plain `model.train()` goes on counting in every BatchNorm, whatever `requires_grad` says."""
    senses.pictures(tmp_path / "rows")
    senses.save_picture_model(tiny.resnet(3), tmp_path / "model")
    run(tmp_path, task="image-classification", freeze=["@embeddings", "@blocks[:2]"])
    before, after = (running_statistics(tmp_path / folder) for folder in ("model", "runs/recipe/model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "stages.2" in name or "stages.3" in name}
    plain = tiny.resnet(3)
    for parameter in plain.resnet.embedder.parameters():
        parameter.requires_grad = False
    plain.train()(torch.rand(4, 3, tiny.IMAGE, tiny.IMAGE))
    assert any(not torch.equal(plain.state_dict()[name], before[name]) for name in before if "embedder" in name)


def leaving_out(model: nn.Module) -> None:
    """transformers leaves out of a file what a model says is not worth keeping."""
    model._keys_to_ignore_on_save = ["classifier.bias"]


def test_head_that_would_not_be_saved(tmp_path: Path, plant: Plant) -> None:
    plant(leaving_out)
    sentence, code, happened = stopped(place(tmp_path), freeze=FROZEN)
    assert sentence.startswith("stage `all`: `classifier.bias` would train and never be saved")
    assert code == GUARD
    assert not events(happened, Step)


def test_trained_tensor_that_the_saved_model_lacks(tmp_path: Path, plant: Plant) -> None:
    """It says so only once the run is under way."""
    passes = itertools.count()
    late = lambda model: leaving_out(model) if next(passes) > 6 else None  # noqa: E731
    plant(lambda model: model.register_forward_hook(lambda *_: late(model)))
    sentence, code, _ = stopped(place(tmp_path), freeze=FROZEN)
    assert sentence == "the saved model doesn't hold `classifier.bias` as the run ended"
    assert code == GUARD


def test_layer_that_is_opened_behind_the_optimizers_back(tmp_path: Path, plant: Plant) -> None:
    """As a callback does it that unfreezes when training begins: it has gradients, and never moves."""

    def opens(model: nn.Module) -> None:
        layer = model.bert.encoder.layer[-1]
        model.register_forward_pre_hook(lambda *_: layer.requires_grad_(True) and None)

    plant(opens)
    sentence, code, happened = stopped(place(tmp_path), freeze=FROZEN)
    assert sentence.startswith("stage `all`: the optimizer and the model disagree about `bert.encoder.layer.3.")
    assert code == GUARD
    assert not events(happened, Step)


def test_stopped_command_has_one_sentence_and_its_code(tmp_path: Path) -> None:
    good = [row for row in tiny.reviews(64) if row["label"] == "good"]
    place(tmp_path, validation=good[24:])
    written = recipe(tmp_path, evaluation="roc_auc")
    done = command(tmp_path, "run", str(written), "--runs", str(tmp_path / "runs"))
    assert done.returncode == GUARD
    assert done.stderr.splitlines() == [
        "stage `all`, step 4: `roc_auc` is nan, so nothing can be best; look at the validation rows"
    ]
    recorded = (tmp_path / "runs/recipe/metrics.jsonl").read_text().splitlines()
    assert json.loads(recorded[-1])["event"] == "step"


def test_sound_recipe_goes_through(tmp_path: Path) -> None:
    """None of the guards above stands in the way of a run that is right."""
    assert draft(place(tmp_path), freeze=FROZEN).plan.stages[0].size > 0
    (proved,) = events(run(tmp_path, freeze=FROZEN), Proved)
    assert (proved.moved, proved.unmoved) == (4, ())
    assert proved.still > 60
