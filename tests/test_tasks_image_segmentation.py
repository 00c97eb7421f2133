"""Semantic segmentation, whole runs: learnt, judged as in the literature, varied with its maps, and refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import running
import tiny
import torch
import transformers
from PIL import Image
from torch import nn

from engine.records import Evaluated, StageStarted, Step
from engine.tasks import Facts
from engine.tasks.image_segmentation import IGNORED, ImageSegmentation

TASK = ImageSegmentation(type="image-segmentation")
SIDE = 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def segformer(num_labels: int = 3) -> nn.Module:
    """A SegFormer of four small stages; BatchNorm sits in its head."""
    sizes: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}
    sizes |= {"num_attention_heads": [1, 1, 2, 2], "sr_ratios": [4, 2, 1, 1], "num_labels": num_labels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes))


def scene(index: int) -> tuple[Image.Image, Image.Image]:
    """A red rectangle on blue noise, and the map that says where: 0, 1, and 255 in its upper left corner."""
    draw = np.random.default_rng(index)
    left, top = draw.integers(2, SIDE // 2, 2)
    ids = np.zeros((SIDE, SIDE), np.uint8)
    ids[top : top + 14, left : left + 14] = 1
    pixels = draw.integers(0, 80, (SIDE, SIDE, 3))
    pixels[..., 2] += 120 * (ids == 0)
    pixels[..., 0] += 120 * (ids == 1)
    ids[:2, :2] = IGNORED
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(ids)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in {"train": 16, "validation": 8}.items():
        folder = tmp_path / "rows" / split
        folder.mkdir(parents=True)
        for index in range(count):
            picture, ids = scene(index + 100 * (split == "train"))
            picture.save(folder / f"{index}.png")
            ids.save(folder / f"{index}-map.png")
        rows = [{"file_name": f"{index}.png", "label_file_name": f"{index}-map.png"} for index in range(count)]
        tiny.write_jsonl(folder / "metadata.jsonl", rows)
    segformer().save_pretrained(tmp_path / "model")
    size = {"height": SIDE, "width": SIDE}
    transformers.SegformerImageProcessorPil(size=size, do_reduce_labels=True).save_pretrained(tmp_path / "model")
    return tmp_path


def run(root: Path, **keys: Any) -> list[Any]:
    return running.run(root, **{"task": "image-segmentation", "stages": [running.stage(epochs=8)], **keys})


def test_it_learns_where_the_rectangle_is(root: Path) -> None:
    task = {"type": "image-segmentation", "labels": ["ground", "box"]}
    judged = running.events(run(root, task=task, stages=[running.stage(epochs=20)]), Evaluated)
    assert set(judged[-1].metrics) == {"loss", "mean_iou", "mean_accuracy", "overall_accuracy"}
    assert judged[-1].metrics["mean_iou"] > 0.7 > judged[0].metrics["mean_iou"]
    config = transformers.AutoConfig.from_pretrained(root / "runs/recipe/model")
    assert config.id2label == {0: "ground", 1: "box"}


def test_frozen_stages_are_replayed(root: Path) -> None:
    stages = [running.stage(epochs=3)]
    plain = run(root, freeze="segformer", stages=stages)
    kept = run(root, freeze="segformer", stages=stages, cache="auto")
    (started,) = running.events(kept, StageStarted)
    assert started.frozen.startswith("replays")
    losses = [[event.loss for event in running.events(happened, Step)] for happened in (plain, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pictures_and_maps_vary_together(root: Path) -> None:
    task = {"type": "image-segmentation", "augmentation": {"random_resized_crop": 0.4, "horizontal_flip": 0.5}}
    judged = running.events(run(root, task=task, stages=[running.stage(epochs=20)]), Evaluated)
    assert judged[-1].metrics["mean_iou"] > 0.7


def outputs(ids: torch.Tensor, classes: int) -> Any:
    """Logits that decide for `ids`."""
    return SimpleNamespace(logits=torch.nn.functional.one_hot(ids, classes).permute(0, 3, 1, 2).float())


def test_scores_are_those_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    given, true = (torch.randint(0, 3, (4, 8, 8), generator=draw) for _ in range(2))
    true[:, 0] = IGNORED
    answers = TASK.answers(outputs(given, 5), {"labels": true})
    found = TASK.score(*answers, TASK.own_metrics, Facts())
    live = true != IGNORED
    given, true = given[live].numpy(), true[live].numpy()
    both = [((given == k) & (true == k)).sum() for k in range(3)]
    union = [((given == k) | (true == k)).sum() for k in range(3)]
    assert found["mean_iou"] == pytest.approx(np.mean(np.divide(both, union)))
    assert found["mean_accuracy"] == pytest.approx(np.mean([both[k] / (true == k).sum() for k in range(3)]))
    assert found["overall_accuracy"] == pytest.approx((given == true).mean())
    assert TASK.weight({"labels": torch.tensor([[0, IGNORED], [1, 1]])}) == 3


def test_background_counts_for_nothing_where_labels_are_reduced() -> None:
    reduced = ImageSegmentation(type="image-segmentation", do_reduce_labels=True)
    assert reduced._classes(np.array([0, 1, 3, IGNORED])).tolist() == [IGNORED, 0, 2, IGNORED]
    assert TASK._classes(np.array([0, 1, 3, IGNORED])).tolist() == [0, 1, 3, IGNORED]


@pytest.mark.parametrize(
    ("change", "task", "said"),
    [
        (
            Image.new("RGB", (SIDE, SIDE)),
            {},
            "split train, row 4: train/3-map.png is a picture in RGB, not a map with one",
        ),
        (Image.new("L", (SIDE, 16)), {}, "split train, row 4: the map has 32 x 16 pixels, its picture 32 x 32"),
        (Image.new("L", (SIDE, SIDE), 7), {"labels": ["a", "b"]}, "a map holds the class 7, but there are 2, 0 to 1"),
    ],
)
def test_maps_are_refused(root: Path, change: Image.Image, task: dict[str, Any], said: str) -> None:
    change.save(root / "rows/train/3-map.png")
    key, sentence = running.refused(root, task={"type": "image-segmentation", **task})
    assert key == ("data", "columns", "label")
    assert said in sentence


def test_class_of_the_validation_rows_alone_is_refused(root: Path) -> None:
    Image.new("L", (SIDE, SIDE), 4).save(root / "rows/validation/0-map.png")
    said = "split validation: a map holds the class 4, but there are 2, 0 to 1; 255 marks what has no class"
    assert running.refused(root, task="image-segmentation")[1] == said


def test_processor_that_knows_no_maps_is_refused(root: Path) -> None:
    with pytest.raises(Exception, match="ViTImageProcessorPil, doesn't prepare maps of classes"):
        TASK.encode(
            {
                "image": [{"bytes": None, "path": str(root / "rows/train/0.png")}],
                "label": [{"bytes": None, "path": str(root / "rows/train/0-map.png")}],
            },
            transformers.ViTImageProcessorPil(),
            Facts(),
        )
