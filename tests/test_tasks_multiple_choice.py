"""Choices stay with their question, whatever their number is, and the loss sets them against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from running import FROZEN, events, place, refused, run, stage
from torch.nn.functional import cross_entropy

from engine import data
from engine.errors import PlanError
from engine.recipe import Recipe
from engine.records import Evaluated, StageStarted
from engine.tasks import Facts
from engine.tasks.multiple_choice import MultipleChoice, chosen

TASK = "multiple-choice"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(count: int) -> list[dict[str, Any]]:
    """Texts and three choices of one to three words; the right one holds `good`."""
    made = []
    for index, review in enumerate(tiny.reviews(count)):
        choices = ["dull plot", "bad", "no fun cast"]
        choices[index % 3] = " ".join(["good", "film", "and"][: 1 + index % 3])
        made.append({"question": review["text"].rsplit(" ", 1)[0], "choices": choices, "label": index % 3})
    return made


def home(root: Path, train: list[dict[str, Any]] | None = None, validation: list[dict[str, Any]] | None = None) -> Path:
    model = tiny.bert(kind="BertForMultipleChoice")
    return place(root, model, train or rows(48), validation or rows(64)[48:])


@pytest.mark.parametrize(
    ("label", "place"),
    [(0, 0), (2, 2), (3, None), (-1, None), ("1", 1), ("B", 1), ("D", None), ("good film", 1), ("no", None), (2.0, 2)],
)
def test_a_label_is_a_number_a_letter_or_the_choice(label: Any, place: int | None) -> None:
    assert chosen(label, ["bad", "good film", "dull"]) == place


def test_the_loss_is_that_of_the_model_s_own_layout() -> None:
    """One text a row or (examples, choices, tokens): transformers computes the same of both."""
    task, model = MultipleChoice(type=TASK), tiny.bert(kind="BertForMultipleChoice").eval()
    columns = {key: [row[key] for row in rows(4)] for key in ("question", "choices", "label")}
    made = task.encode(columns, tiny.tokenizer(), Facts(members=3))
    made.pop("truncated")
    examples = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
    batch = task.collate(tiny.tokenizer())(examples)
    assert batch["labels"].view(4, 3).argmax(1).tolist() == columns["label"]
    assert task.weight(batch) == 4
    with torch.no_grad():
        outputs = task.forward(model, batch)
        whole = {key: value.view(4, 3, -1) for key, value in batch.items() if key != "labels"}
        reference = model(**whole, labels=torch.tensor(columns["label"]))
    torch.testing.assert_close(outputs.logits, reference.logits)
    torch.testing.assert_close(outputs.loss, reference.loss)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, torch.tensor(columns["label"])))


def test_a_context_goes_before_question_and_choice(tmp_path: Path) -> None:
    made = [{**row, "context": "the cast is fun"} for row in rows(8)]
    recipe = Recipe.model_validate({"model": "a/b", "task": {"type": TASK}, "data": "rows"})
    read = data.read(recipe, home(tmp_path, made[:6], made[6:]))
    encoded = data.encode(read, recipe.task, tiny.tokenizer())
    assert (len(encoded.train), encoded.train.members) == (6, 3)
    texts = [tiny.tokenizer().decode(example["input_ids"]) for example in encoded.train.examples([1])]
    first, _, second = texts[1].removeprefix("[CLS] ").partition(" [SEP] ")
    assert first == made[1]["context"]
    assert second == f"{made[1]['question']} {made[1]['choices'][1]} [SEP]"


def test_examples_are_never_torn_apart(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "a/b", "task": {"type": TASK}, "data": "rows"})
    split = data.encode(data.read(recipe, home(tmp_path)), recipe.task, tiny.tokenizer()).train
    assert split.rows([5, 2]) == [15, 16, 17, 6, 7, 8]
    assert [example["labels"] for example in split.examples([5, 2])] == [0, 0, 1, 0, 0, 1]
    assert len(split.single) == 3 * len(split)
    assert split.lengths.tolist() == split.single.lengths.reshape(-1, 3).max(1).tolist()


@pytest.mark.parametrize(
    ("row", "key", "said"),
    [
        ({"choices": ["a", "b"]}, "choices", "`choices` are not 3 as in the first training row"),
        ({"choices": ["a", "b", None]}, "choices", "an item of `choices` has no value"),
        ({"label": 3}, "label", "`label` is 3, which is none of the choices"),
        ({"label": None}, "label", "`label` has no value"),
        ({"question": ""}, "question", "`question` is empty"),
    ],
)
def test_rows_are_refused(tmp_path: Path, row: dict[str, Any], key: str, said: str) -> None:
    made = rows(8)
    place, sentence = refused(home(tmp_path, [*made[:4], {**made[4], **row}, *made[5:]]), task=TASK)
    assert place == ("data", "columns", key)
    assert sentence.startswith(f"train.jsonl, row 5: {said}")


def test_replayed_equals_computed_and_the_right_choice_is_learnt(tmp_path: Path) -> None:
    keys = {"task": TASK, "freeze": FROZEN, "stages": [stage(unfreeze="@blocks[-2:]", epochs=6, learning_rate=2e-2)]}
    plain = run(home(tmp_path), **keys)
    kept = run(tmp_path, **keys, cache="auto")
    assert events(kept, StageStarted)[0].frozen.startswith("replays ")
    metrics = [[event.metrics for event in events(happened, Evaluated)] for happened in (plain, kept)]
    assert metrics[0] == [pytest.approx(each, abs=1e-4) for each in metrics[1]]
    assert max(each["accuracy"] for each in metrics[0]) > 0.8


def test_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no classes to smooth"):
        run(home(tmp_path), task=TASK, training={"label_smoothing_factor": 0.1})
