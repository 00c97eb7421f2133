"""Image classification, whole runs: learnt, replayed, varied, BatchNorms held, loaded by plain pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import running
import senses
import tiny
import torch
import transformers
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from engine import data
from engine.errors import PlanError, RunError
from engine.records import Evaluated, Note, StageStarted, Step
from engine.tasks.image_classification import ImageClassification
from engine.tasks.pictures import Augmentation, vary

AUGMENTED = {"type": "image-classification", "augmentation": {"random_resized_crop": 0.5, "horizontal_flip": 0.5}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    senses.pictures(tmp_path / "rows")
    senses.save_picture_model(tiny.vit(3), tmp_path / "model")
    return tmp_path


def run(root: Path, **keys: Any) -> list[Any]:
    plain = {"task": "image-classification", "freeze": ["@embeddings", "@blocks[:2]"]}
    return running.run(root, **{**plain, "stages": [running.stage(epochs=4)], **keys})


def losses(happened: list[Any]) -> list[float]:
    return [event.loss for event in running.events(happened, Step)]


def test_it_learns_colours_and_a_replay_is_exact(root: Path) -> None:
    plain = run(root)
    last = running.events(plain, Evaluated)[-1]
    assert last.metrics["accuracy"] == 1.0
    again = run(root, cache="auto")
    (started,) = running.events(again, StageStarted)
    assert started.frozen.startswith("replays")
    assert losses(again) == losses(plain)


def test_saved_model_is_what_a_pipeline_loads(root: Path) -> None:
    run(root)
    model = root / "runs/recipe/model"
    classify = transformers.pipeline("image-classification", model=str(model))
    for name in sorted(senses.COLORS):
        assert classify(senses.picture(name, 99))[0]["label"] == name


def test_several_labels_and_numbers(root: Path) -> None:
    for split, count in senses.SPLITS.items():
        for place in (root / "rows" / split).glob("*/*"):
            place.rename(root / "rows" / split / place.name)
        names = sorted(place.name for place in (root / "rows" / split).glob("*.png"))
        rows = [{"file_name": name, "label": [["a"], ["a", "b"], []][index % 3]} for index, name in enumerate(names)]
        assert len(rows) == count
        tiny.write_jsonl(root / "rows" / split / "metadata.jsonl", rows)
    happened = run(root, evaluation="f1_micro")
    assert 0 <= running.events(happened, Evaluated)[-1].metrics["f1_micro"] <= 1
    assert json.loads((root / "runs/recipe/model/config.json").read_text())["problem_type"] == (
        "multi_label_classification"
    )


# Augmentation


def test_augmentation_varies_what_is_trained_on_and_keeps_nothing(root: Path) -> None:
    varied = run(root, task=AUGMENTED, cache="auto")
    (started,) = running.events(varied, StageStarted)
    assert started.frozen == "computes in full: the examples are drawn anew in each epoch"
    assert losses(varied) != losses(run(root))
    assert losses(varied) == losses(run(root, task=AUGMENTED))


def test_what_judges_never_varies() -> None:
    task = ImageClassification.model_validate(AUGMENTED)
    plain = ImageClassification(type="image-classification")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    shown = senses.picture("red", 1)
    examples = [{"picture": shown, "labels": 0}]
    expected = processor(images=[shown], return_tensors="pt")["pixel_values"]
    assert torch.equal(task.collate(processor)(examples)["pixel_values"], expected)
    assert not torch.equal(task.collate(processor)([{**examples[0], "seed": 1}])["pixel_values"], expected)
    assert (task.draws, plain.draws) == (True, False)


def test_variations_follow_from_the_seed_alone() -> None:
    how = Augmentation(random_resized_crop=0.3, horizontal_flip=0.5, color_jitter=0.3)
    shown = senses.picture("red", 1)
    drawn = [np.asarray(vary(shown, how, seed)[0].resize((8, 8))) for seed in (1, 1, 2)]
    np.random.seed(0)
    assert (drawn[0] == drawn[1]).all()
    assert not (drawn[0] == drawn[2]).all()


def test_a_crop_keeps_its_share_and_its_ratio() -> None:
    how = Augmentation(random_resized_crop=0.4)
    areas = []
    for seed in range(200):
        cut = vary(Image.new("RGB", (100, 80)), how, seed)[0]
        assert 0.7 <= cut.width / cut.height <= 1.4
        areas.append(cut.width * cut.height / 8_000)
    assert 0.38 <= min(areas) < 0.5
    assert 0.8 < max(areas) <= 1


def test_a_map_is_cut_and_mirrored_with_its_picture() -> None:
    how = Augmentation(random_resized_crop=0.3, horizontal_flip=0.5)
    level = np.random.default_rng(0).integers(0, 200, (20, 30)).astype(np.uint8)
    for seed in range(20):
        picture, ids = vary(Image.fromarray(level), how, seed, Image.fromarray(level))
        assert ids is not None
        assert (np.asarray(picture) == np.asarray(ids)).all()


# Batches


def test_pictures_of_different_sizes_are_refused() -> None:
    task = ImageClassification(type="image-classification")
    processor = transformers.ViTImageProcessorPil(do_resize=False)
    examples = [{"pixel_values": np.zeros((3, side, 8)), "labels": 0} for side in (8, 9)]
    with pytest.raises(PlanError, match="leaves pictures of different sizes"):
        task.collate(processor)(examples)


def test_examples_are_made_once_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def prepare(columns: Any) -> dict[str, Any]:
        made.extend(columns["number"])
        return {"pixel_values": [np.full(100, number, np.float32) for number in columns["number"]]}

    monkeypatch.setattr("engine.rows.split.KEPT", 400 * 3)
    split = data.Split(Dataset.from_dict({"number": list(range(5))}), prepare)
    for _ in range(2):
        examples = split.examples([4, 1, 4, 0, 2])
        assert [int(example["pixel_values"][0]) for example in examples] == [4, 1, 4, 0, 2]
        examples[0]["seed"] = 1
    assert made == [4, 1, 0, 2, 2]
    assert "seed" not in split.examples([4])[0]


# BatchNorm


def norms(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "running" in name}


def test_frozen_batchnorms_stand_still_and_trained_ones_move(root: Path) -> None:
    senses.save_picture_model(tiny.resnet(3), root / "model")
    run(root, freeze=["@embeddings", "@blocks[:2]"])
    before, after = norms(root / "model"), norms(root / "runs/recipe/model")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if "embedder" in name or "stages.0" in name or "stages.1" in name}
    assert still
    assert len(still) < len(before)


def efficientnet(**config: Any) -> nn.Module:
    """An EfficientNet of two small blocks, its momentum that of its config class."""
    sizes: dict[str, Any] = {"in_channels": [8, 8], "out_channels": [8, 8], "kernel_sizes": [3, 3], "strides": [1, 2]}
    sizes |= {"num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [], "hidden_dim": 320}
    sizes |= {"width_coefficient": 0.25, "depth_coefficient": 1.0, "image_size": 32, "num_labels": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.EfficientNetForImageClassification(transformers.EfficientNetConfig(**(sizes | config)))


def test_momentum_of_tensorflow_is_turned_round(root: Path) -> None:
    senses.save_picture_model(efficientnet(), root / "model")
    happened = run(root, freeze=[], stages=[running.stage(learning_rate=1e-5, steps=1)])
    said = [note.sentence for note in running.events(happened, Note) if "BatchNorm" in note.sentence]
    assert len(said) == 1
    assert said[0].endswith("0.99 of the past is meant to stay: momentum 0.01 in torch's words")
    assert json.loads((root / "runs/recipe/model/config.json").read_text())["batch_norm_momentum"] == 0.01
    before, after = norms(root / "model"), norms(root / "runs/recipe/model")
    variances = [name for name in before if name.endswith("running_var")]
    # one step takes a hundredth of the past away, and a tenth where transformers leaves the momentum to torch
    assert all((after[name] >= (0.89 if "expand_bn" in name else 0.989)).all() for name in variances)
    assert any(not torch.equal(before[name], after[name]) for name in variances)


def test_frozen_efficientnet_stands_still(root: Path) -> None:
    senses.save_picture_model(efficientnet(), root / "model")
    run(root, freeze=["efficientnet"])
    before, after = norms(root / "model"), norms(root / "runs/recipe/model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# timm


@pytest.mark.parametrize("more", [{}, {"model_type": "timm_wrapper"}])
def test_timm_without_timm_is_one_sentence(root: Path, more: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    senses.write_json(root / "model/config.json", {"architecture": "resnet18", "num_classes": 3, **more})
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(RunError, match=r"^model is a timm model, and timm doesn.t import here .*; install") as caught:
        running.draft(root, task="image-classification")
    assert caught.value.exit_code == 3
