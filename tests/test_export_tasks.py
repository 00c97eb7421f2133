"""Every task's model as a graph, by torch.export and as ONNX: opened elsewhere, asked other shapes, it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import running
import senses
import test_export
import test_tasks_automatic_speech_recognition as speech
import test_tasks_image_segmentation as segmentation
import test_tasks_multiple_choice as choices
import test_tasks_object_detection as detection
import test_tasks_preferences as preferences
import test_tasks_question_answering as answers
import test_tasks_sentence_similarity as similarity
import test_tasks_text_generation as generation
import test_tasks_token_classification as tokens
import test_tasks_written as written
import tiny
import transformers

from engine import export
from engine.errors import RunError
from engine.records import Evaluated

Keys = dict[str, Any]
QUICK: Keys = {"stages": [running.stage(steps=1)]}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(kind: str, rows: Callable[[int], list[Any]]) -> Callable[[Path], Keys]:
    def place(root: Path) -> Keys:
        made = rows(40)
        running.place(root, tiny.bert(3, kind=kind), made[:32], made[32:])
        return {}

    return place


def plain(count: int) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in tiny.reviews(count)]


def pictures(root: Path) -> Keys:
    senses.pictures(root / "rows")
    senses.save_picture_model(tiny.vit(3), root / "model")
    return {}


def scenes(root: Path) -> Keys:
    for split in ("train", "validation"):
        folder = root / "rows" / split
        folder.mkdir(parents=True)
        for index in range(8):
            for name, picture in zip(("", "-map"), segmentation.scene(index), strict=True):
                picture.save(folder / f"{index}{name}.png")
        rows = [{"file_name": f"{index}.png", "label_file_name": f"{index}-map.png"} for index in range(8)]
        tiny.write_jsonl(folder / "metadata.jsonl", rows)
    segmentation.segformer(2).save_pretrained(root / "model")
    size = {"height": segmentation.SIDE, "width": segmentation.SIDE}
    transformers.SegformerImageProcessorPil(size=size).save_pretrained(root / "model")
    return {}


def sounds(root: Path) -> Keys:
    senses.tones(root / "rows")
    senses.save_sound_model(senses.wav2vec2(num_labels=2), root / "model")
    return {}


def said(root: Path) -> Keys:
    speech.write(root, "train", [speech.said(index) for index in range(8)], 0)
    speech.write(root, "validation", [speech.said(index) for index in range(100, 106)], 100)
    speech.save(root / "model")
    return {}


def squares(root: Path) -> Keys:
    detection.place(root, detection.yolos())
    return {}


def language(root: Path) -> Keys:
    generation.place(root)
    return {}


def packed(root: Path) -> Keys:
    generation.place(root)
    return {"task": {"type": "text-generation", "packing": True, "max_length": 24}}


def preferred(root: Path) -> Keys:
    preferences.place(root, preferences.rows(24), preferences.rows(8))
    return {"task": preferences.DPO}


def asked(root: Path) -> Keys:
    texts("BertForQuestionAnswering", answers.rows)(root)
    return {"task": answers.TASK}


def summaries(root: Path) -> Keys:
    written.place(root, written.rows(32), written.rows(8))
    return {}


def translations(root: Path) -> Keys:
    rows = [{"translation": {"en": row["text"], "de": row["summary"]}} for row in written.rows(40)]
    written.place(root, rows[:32], rows[32:])
    return {"task": {"type": "translation", "source_lang": "en", "target_lang": "de"}}


PLACES: dict[str, Callable[[Path], Keys]] = {
    "audio-classification": sounds,
    "automatic-speech-recognition": said,
    "fill-mask": texts("BertForMaskedLM", plain),
    "image-classification": pictures,
    "image-segmentation": scenes,
    "multiple-choice": texts("BertForMultipleChoice", choices.rows),
    "object-detection": squares,
    "question-answering": asked,
    "sentence-similarity": texts("BertModel", similarity.pairs),
    "summarization": summaries,
    "text-classification": texts("BertForSequenceClassification", tiny.reviews),
    "text-generation": language,
    "text-generation packed": packed,
    "text-generation preferences": preferred,
    "token-classification": texts("BertForTokenClassification", tokens.rows),
    "translation": translations,
}
FIXED = ("image-classification", "image-segmentation", "object-detection")
"""Their processors make every picture the same size."""


@pytest.mark.parametrize("to", ["torch", "onnx"])
@pytest.mark.parametrize("name", PLACES)
def test_a_graph_answers_as_its_model(tmp_path: Path, name: str, to: str) -> None:
    task = name.split()[0]
    running.run(tmp_path, **{"task": task, **QUICK, **PLACES[name](tmp_path)})
    folder, said = export.export(tmp_path / "runs/recipe", to, root=tmp_path)
    compared = json.loads((folder / "export.json").read_text())["compared"]
    print(name, to, said[0])
    assert all(one["difference"] <= 1e-5 for one in compared)
    shapes = [tuple(max(one["shapes"].values(), key=len)) for one in compared]
    assert shapes[0][0] != shapes[1][0]
    assert task in FIXED or shapes[0][1:] != shapes[1][1:], "another length was asked as well"
    assert test_export.says(folder)


@pytest.mark.parametrize("name", PLACES)
def test_int8_is_judged_as_the_model_was_or_refused(tmp_path: Path, name: str) -> None:
    task = name.split()[0]
    happened = running.run(tmp_path, **{"task": task, **QUICK, **PLACES[name](tmp_path)})
    if task in ("summarization", "translation") or name.endswith("preferences"):
        with pytest.raises(RunError, match="`--int8` is judged on your rows") as caught:
            export.export(tmp_path / "runs/recipe", "onnx", int8=True, root=tmp_path)
        assert caught.value.exit_code == 2
        return
    folder, said = export.export(tmp_path / "runs/recipe", "onnx", int8=True, root=tmp_path)
    print(name, said[1])
    metrics = running.events(happened, Evaluated)[-1].metrics
    scores = json.loads((folder / "export.json").read_text())["int8"]["scores"]["model.onnx"]
    assert scores == pytest.approx({key: metrics[key] for key in scores}, abs=1e-3)
