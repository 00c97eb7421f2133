"""Rows that are read as they come: the same examples for the same seed, wherever a run begins to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import staged
import tiny
from pydantic import ValidationError
from running import events, place, refused, run, stage, stopped

from engine import data
from engine.recipe import Recipe
from engine.records import Evaluated, Note, Proved, StageStarted, Step
from engine.rows.split import Split

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
TEXTS = [{"text": f"{row['text']} no {index}"} for index, row in enumerate(tiny.reviews(60))]
TASK = {"type": "text-generation", "max_length": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def llama(root: Path, rows: list[dict[str, Any]] = TEXTS) -> Path:
    place(root, tiny.llama(), rows, TEXTS[:8])
    tiny.byte_level().save_pretrained(root / "model")
    return root


def streamed(root: Path, splits: dict[str, str] | None = None, **keys: Any) -> Split:
    source = {"path": "rows", "streaming": True, "splits": splits or {}}
    named = {"model": "m", "task": TASK, "data": source, "stages": (stage(steps=20),), "batch_size": 8, **keys}
    recipe = Recipe.model_validate(named)
    return data.encode(data.read(recipe, root), recipe.task, tiny.byte_level()).train


def ids(split: Split, indices: range) -> list[list[int]]:
    return [example["input_ids"] for example in split.examples(indices)]


@pytest.mark.parametrize("packing", [False, True])
def test_what_a_number_means_follows_from_seed_and_stage(tmp_path: Path, packing: bool) -> None:
    task = {**TASK, "packing": packing}
    one, other = (streamed(llama(tmp_path), task=task) for _ in range(2))
    one.order("random", 8, 3, "first", 0), other.order("random", 8, 3, "first", 0)
    whole = ids(one, range(150))
    assert ids(other, range(96, 104)) == whole[96:104]
    assert ids(other, range(8, 16)) == whole[8:16]  # back again
    one.order("random", 8, 3, "second", 0)
    assert ids(one, range(150)) != whole
    other.order("random", 8, 4, "first", 0)
    assert ids(other, range(150)) != whole


def test_every_row_comes_once_before_any_comes_twice(tmp_path: Path) -> None:
    split = streamed(llama(tmp_path))
    split.order("random", 8, 0, "all", 0)
    first, second = ids(split, range(60)), ids(split, range(60, 120))
    assert first != second
    assert sorted(first) == sorted(second)
    assert len({tuple(row) for row in first}) == 60
    split.order("sequential", 8, 0, "all", 0)
    assert ids(split, range(60)) == [tiny.byte_level()(row["text"])["input_ids"] + [2] for row in TEXTS]


def test_rows_that_judge_are_not_trained_on(tmp_path: Path) -> None:
    root = llama(tmp_path)
    (root / "rows/validation.jsonl").unlink()
    split = streamed(root, {"validation": "train[:20]"})
    split.order("sequential", 8, 0, "all", 0)
    assert ids(split, range(40)) == ids(split, range(40, 80))
    assert ids(split, range(1))[0][:-1] == tiny.byte_level()(TEXTS[20]["text"])["input_ids"]


def test_a_run_reads_on_and_says_so(tmp_path: Path) -> None:
    stages = [stage("head", steps=4), stage("top", unfreeze="@blocks[-2:]", steps=12)]
    keys = {"freeze": "@blocks", "stages": stages, "training": {"logging_steps": 1}, "cache": "auto"}
    happened = run(llama(tmp_path), task=TASK, data={"path": "rows", "streaming": True}, **keys)
    losses = [event.loss for event in events(happened, Step)]
    assert len(losses) == 16
    assert losses[-1] < losses[0]
    assert events(happened, Proved)
    assert len(events(happened, Evaluated)) >= 2
    assert all("a stream's examples pass by once" in event.frozen for event in events(happened, StageStarted))
    assert any("read as a stream" in event.sentence for event in events(happened, Note))


def streaming(root: Path, task: str) -> Path:
    """A place for staged runs, which go over a stream of 60 rows twice."""
    keys: dict[str, Any] = {
        "task": task,
        "data": {"path": "rows", "streaming": True},
        "stages": [{"name": "head", "steps": 3}, {"name": "top", "unfreeze": "@blocks[-2:]", "steps": 12}],
        "evaluation": {"eval_steps": 4},
    }
    staged.place(root, **keys, freeze="@blocks")
    tiny.write_jsonl(root / "rows/train.jsonl", TEXTS)
    tiny.write_jsonl(root / "rows/validation.jsonl", TEXTS[:8])
    model = tiny.llama() if task == "text-generation" else tiny.bert(kind="BertForMaskedLM")
    tiny.save(model, root / "model", tiny.byte_level() if task == "text-generation" else None)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-generation", "fill-mask"])
def test_cut_off_and_resumed_it_is_the_uninterrupted_run(tmp_path: Path, task: str) -> None:
    """On one process and on two in turn, for two read the same stream."""
    whole, cut, two = (streaming(tmp_path / name, task) for name in ("whole", "cut", "two"))
    assert staged.run(whole) == [0], staged.said(whole)
    for ranks in (1, 2, 1):
        staged.run(cut, ranks=ranks, plant=staged.signal_at(3, staged.signal.SIGKILL))
    assert staged.run(cut) == [0], staged.said(cut)
    assert staged.run(two, ranks=2) == [0, 0], staged.said(two) + staged.said(two, 1)
    for other in (cut, two):
        assert staged.equal(staged.weights(whole), staged.weights(other))
        assert staged.history(whole) == staged.history(other)


# Refusals


def test_tasks_that_need_all_rows_are_refused(tmp_path: Path) -> None:
    key, said = refused(place(tmp_path), data={"path": "rows", "streaming": True})
    assert key == ("data", "streaming")
    assert said.startswith("text-classification learns from all rows")


@pytest.mark.parametrize("stages", [({"name": "a", "epochs": 1},), {"type": "lp_ft", "steps": 5}])
def test_a_stream_has_no_epochs(stages: Any) -> None:
    with pytest.raises(ValidationError, match="a stream has no epochs"):
        Recipe.model_validate({"model": "m", "task": TASK, "data": {"path": "d", "streaming": True}, "stages": stages})


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"validation": 0.1}, "no length to take a share of"),
        ({"validation": "train"}, "only some of its first rows"),
        ({"validation": "train[:100]"}, "holds no rows behind the 100 rows"),
        ({"train": "train[:10]"}, "goes on to its end"),
        ({"validation": "dev"}, "have no split `dev`"),
    ],
)
def test_slices_that_only_a_length_could_tell(tmp_path: Path, splits: dict[str, Any], said: str) -> None:
    source = {"path": "rows", "streaming": True, "splits": splits}
    key, sentence = refused(llama(tmp_path), task=TASK, data=source)
    assert key[:2] in (("data", "splits"), ("data", "path"))
    assert said in sentence


def test_a_bad_row_far_behind_stops_the_run_by_its_words(tmp_path: Path) -> None:
    rows = [{"text": f"the film is good {index}"} for index in range(2100)]
    rows[2050] = {"text": "   "}
    root = llama(tmp_path, rows)
    training = {"train_sampling_strategy": "sequential"}
    keys = {"data": {"path": "rows", "streaming": True}, "stages": [stage(steps=40)], "batch_size": 64}
    sentence, code, _ = stopped(root, task=TASK, training=training, **keys)
    assert code == 5
    assert "train.jsonl, the row that begins" in sentence
    assert "`text` is empty" in sentence
