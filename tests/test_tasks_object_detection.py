"""Object detection, whole runs: learnt, judged as COCO does, the same in any company, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import running
import staged
import tiny
import torch
import transformers
from PIL import Image
from torch import nn

from engine.records import Evaluated, StageStarted, Step
from engine.tasks import Facts, boxes
from engine.tasks.boxes import Objects
from engine.tasks.object_detection import ObjectDetection

TASK = ObjectDetection(type="object-detection")
SIDE = 32
NAMES = ("red", "blue")

# transformers' loss indexes by a list of tensors
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")
RATES = {"max_grad_norm": 0.1, "warmup_steps": 0.1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def yolos() -> nn.Module:
    """A YOLOS of two blocks that looks for five objects in patches of 8 pixels."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 2}
    sizes |= {"intermediate_size": 256, "image_size": [SIDE, SIDE], "patch_size": 8, "num_detection_tokens": 5}
    return seeded(transformers.YolosForObjectDetection, transformers.YolosConfig(**sizes))


def detr() -> nn.Module:
    """A DETR of one encoder and one decoder layer on a small ResNet, which looks for five objects."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "dropout": 0.0}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, num_labels=2, **sizes
    )
    return seeded(transformers.DetrForObjectDetection, config)


def seeded(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


def scene(index: int) -> tuple[Image.Image, list[list[float]], list[int]]:
    """A red or a blue square, or both, on grey noise; where they are, and which is which."""
    draw = np.random.default_rng(index)
    pixels = draw.integers(60, 120, (SIDE, SIDE, 3)).astype(np.uint8)
    placed, kinds = [], []
    for kind in {0: (0,), 1: (1,), 2: (0, 1)}[index % 3]:
        left, top = (int(v) for v in draw.integers(1, SIDE // 2 - 9, 2) + (SIDE // 2 if kind else 0))
        pixels[top : top + 8, left : left + 8] = (250, 10, 10) if kind == 0 else (10, 10, 250)
        placed.append([float(left), float(top), 8.0, 8.0])
        kinds.append(kind)
    return Image.fromarray(pixels), placed, kinds


def place(root: Path, model: nn.Module, names: bool = True) -> Path:
    for split, count in {"train": 24, "validation": 9}.items():
        folder = root / "rows" / split
        folder.mkdir(parents=True)
        rows = []
        for index in range(count):
            picture, placed, kinds = scene(index + 100 * (split == "train"))
            picture.save(folder / f"{index}.png")
            held = {"bbox": placed, "category": [NAMES[kind] for kind in kinds] if names else kinds}
            rows.append({"file_name": f"{index}.png", "objects": held})
        tiny.write_jsonl(folder / "metadata.jsonl", rows)
    model.save_pretrained(root / "model")
    size = {"shortest_edge": SIDE, "longest_edge": SIDE}
    kind = transformers.YolosImageProcessorPil if isinstance(model, transformers.YolosForObjectDetection) else None
    (kind or transformers.DetrImageProcessorPil)(size=size).save_pretrained(root / "model")
    return root


def run(root: Path, **keys: Any) -> list[Any]:
    return running.run(root, **{"task": "object-detection", "stages": [running.stage(epochs=2)], **keys})


@pytest.mark.parametrize(
    ("make", "reaches"),
    [pytest.param(yolos, 0.3, marks=pytest.mark.slow), pytest.param(detr, 0.1, marks=pytest.mark.slow)],
)
def test_it_learns_to_find_squares(tmp_path: Path, make: Any, reaches: float) -> None:
    stages, evaluation = [running.stage(epochs=60, learning_rate=3e-3)], {"eval_steps": 90}
    happened = run(place(tmp_path, make()), stages=stages, evaluation=evaluation, training=RATES)
    judged = running.events(happened, Evaluated)
    assert set(judged[-1].metrics) == {"loss", "map", "map_50", "map_75", "mar_100"}
    assert judged[-1].metrics["map_50"] > reaches
    config = transformers.AutoConfig.from_pretrained(tmp_path / "runs/recipe/model")
    assert config.id2label == {0: "blue", 1: "red"}


@pytest.mark.slow
def test_what_is_found_is_what_transformers_own_pipeline_finds(tmp_path: Path) -> None:
    root = place(tmp_path, yolos())
    run(root, stages=[running.stage(epochs=120, learning_rate=3e-3)], training=RATES)
    find = transformers.pipeline("object-detection", model=str(root / "runs/recipe/model"), device="cpu")
    picture, placed, kinds = scene(0)
    found = find(picture, threshold=0.5)
    assert [each["label"] for each in found] == [NAMES[kind] for kind in kinds]
    left, top, _, height = placed[0]
    assert abs(found[0]["box"]["xmin"] - left) <= 4
    assert abs(found[0]["box"]["ymax"] - top - height) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("make", [yolos, detr])
def test_a_frozen_prefix_is_replayed(tmp_path: Path, make: Any) -> None:
    root, stages = place(tmp_path, make()), [running.stage(epochs=3, unfreeze="@head")]
    keys = {"freeze": ".*", "stages": stages, "training": {"logging_steps": 1}}
    plain, kept = run(root, **keys), run(root, **keys, cache="auto")
    (started,) = running.events(kept, StageStarted)
    assert started.frozen.startswith("replays")
    losses = [[event.loss for event in running.events(happened, Step)] for happened in (plain, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("make", [yolos, detr])
def test_two_devices_find_what_one_does(tmp_path: Path, make: Any) -> None:
    """Half of a batch has another number of objects than the other half, or none."""
    one, two = (place(tmp_path / name, make()) for name in ("one", "two"))
    stages = [{"name": "all", "steps": 4, "learning_rate": 1e-3}]
    for root, ranks in ((one, 1), (two, 2)):
        staged.write(root, task="object-detection", freeze=[], stages=stages, evaluation={"eval_steps": 2})
        assert staged.run(root, ranks=ranks) == [0] * ranks, staged.said(root) + staged.said(root, ranks - 1)
    judged = [[each["metrics"] for each in staged.history(root) if each["event"] == "evaluated"] for root in (one, two)]
    assert len(judged[0]) == 2
    assert judged[0] == judged[1]
    assert staged.equal(staged.weights(one), staged.weights(two))


def test_examples_do_not_depend_on_their_company(tmp_path: Path) -> None:
    """Pictures of any shape become squares of one size, and boxes shares of them."""
    processor = transformers.DetrImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": SIDE})
    wide, tall = Image.new("RGB", (40, 20)), Image.new("RGB", (16, 64))
    for picture, name in ((wide, "wide.png"), (tall, "tall.png")):
        picture.save(tmp_path / name)
    files = [{"bytes": None, "path": str(tmp_path / name)} for name in ("wide.png", "tall.png")]
    held = [{"bbox": [[10, 5, 20, 10]], "category": [1]}, {"bbox": [], "category": []}]
    facts = Facts(("a", "b"), "", "ids")
    both = TASK.encode({"image": files, "objects": held}, processor, facts)
    alone = TASK.encode({"image": files[:1], "objects": held[:1]}, processor, facts)
    assert np.array_equal(both["pixel_values"][0], alone["pixel_values"][0])
    assert np.array_equal(both["pixel_mask"][0], alone["pixel_mask"][0])
    assert both["boxes"][0] == pytest.approx(np.array([[0.5, 0.25, 0.5, 0.25]]))
    examples = [{name: values[index] for name, values in both.items()} for index in range(2)]
    batch = TASK.collate(processor)(examples)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert [len(each["class_labels"]) for each in batch["labels"]] == [1, 0]
    assert batch["labels"][1]["boxes"].shape == (0, 4)


def test_scores_are_those_of_the_definition() -> None:
    there = [np.array([[0.3, 0.3, 0.2, 0.2, 0], [0.7, 0.7, 0.2, 0.2, 1]]), np.array([[0.5, 0.5, 0.4, 0.4, 0]])]
    exact = [np.c_[rows, np.full(len(rows), 0.9)] for rows in there]
    assert boxes.precision(exact, there, 2) == pytest.approx(dict.fromkeys(TASK.own_metrics, 1.0))
    shifted = [rows.copy() for rows in exact]
    shifted[1][0, 0] += 0.1  # an overlap of 0.3 / 0.5: one of the two of class 0 counts at 0.5 to 0.6 alone
    found = boxes.precision(shifted, there, 2)
    assert found["map_50"] == pytest.approx(1.0)
    assert found["map_75"] == pytest.approx((1 + 51 / 101) / 2, abs=1e-3)
    extra = [np.r_[exact[0], [[0.1, 0.9, 0.1, 0.1, 0, 0.95]]], exact[1]]
    assert boxes.precision(extra, there, 2)["map_50"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-3)
    nothing = [np.zeros((0, 6)), np.zeros((0, 6))]
    assert boxes.precision(nothing, there, 2) == dict.fromkeys(TASK.own_metrics, 0.0)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({"bbox": [[1, 1, 4, 4]], "category": []}, "there are 1 boxes and 0 classes"),
        ({"bbox": [[1, 1, 0, 4]], "category": [0]}, "is no box"),
        ({"bbox": [[30, 1, 8, 4]], "category": [0]}, "lies outside its picture of 32 x 32 pixels"),
        ({"bbox": [[1, 1, 4, 4]], "category": [2]}, "an object is of the class `2`, and train has LABEL_0, LABEL_1"),
    ],
)
def test_boxes_are_refused(tmp_path: Path, objects: dict[str, Any], words: str) -> None:
    root = place(tmp_path, yolos(), names=False)
    file = root / "rows/validation/metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["objects"] = objects
    tiny.write_jsonl(file, rows)
    key, said = running.refused(root, task="object-detection")
    assert key == ("data", "columns", "objects")
    assert "split validation, row 4" in said
    assert words in said


@pytest.mark.parametrize(
    "value",
    [
        {"bbox": [[1, 2, 3, 4]], "categories": ["a"]},
        [{"bbox": [1, 2, 3, 4], "label": "a"}],
        '{"boxes": [[1, 2, 3, 4]], "category_id": ["a"]}',
    ],
)
def test_objects_are_read_as_data_sets_write_them(value: Any) -> None:
    assert boxes.read(value) == Objects(((1.0, 2.0, 3.0, 4.0),), ("a",))


def test_processor_that_knows_no_boxes_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "one.png")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "one.png")}], "objects": [{"bbox": [], "category": []}]}
    with pytest.raises(Exception, match="ViTImageProcessorPil, doesn't prepare boxes"):
        TASK.encode(rows, transformers.ViTImageProcessorPil(), Facts(("a",), "", "names"))
