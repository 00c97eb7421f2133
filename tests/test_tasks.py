"""What a label column says, what is refused, and that labels, batches and metrics are what the model's loss wants."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import sklearn.metrics
import tiny
import torch
from datasets import ClassLabel, Features, List, Value

from engine import data, metrics
from engine.errors import PlanError
from engine.recipe import Recipe
from engine.tasks import labels

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def recipe(path: str = "set", **task: Any) -> Recipe:
    return Recipe.model_validate({"model": "a/b", "task": {"type": "text-classification", **task}, "data": path})


def labelled(root: Path, train: list[Any], validation: list[Any] | None = None, feature: Any = None) -> None:
    """A folder `set` whose rows have these labels; as Parquet where the labels' feature type is given."""
    for name, values in (("train", train), ("validation", validation)):
        if values is None:
            continue
        rows = [{"text": f"film {index} of {name}", "label": value} for index, value in enumerate(values)]
        if feature is None:
            tiny.write_jsonl(root / f"set/{name}.jsonl", rows)
        else:
            (root / "set").mkdir(exist_ok=True)
            features = Features({"text": Value("string"), "label": feature})
            datasets.Dataset.from_list(rows, features=features).to_parquet(root / f"set/{name}.parquet")


def learn(root: Path, **task: Any) -> data.Rows:
    return data.read(recipe(**task), root)


def learnt(root: Path, count: int, **task: Any) -> tuple[Any, list[Any]]:
    """What the labels say, and the first `count` labels of the training rows as the model takes them."""
    rows = learn(root, **task)
    examples = data.encode(rows, recipe(**task).task, tiny.tokenizer()).train.examples(range(count))
    return rows.facts, [example["labels"] for example in examples]


def refused(root: Path, **task: Any) -> tuple[str, str]:
    with pytest.raises(PlanError) as caught:
        learn(root, **task)
    (problem,) = caught.value.problems
    return ".".join(map(str, problem.key)), problem.sentence


# Kinds of labels


@pytest.mark.parametrize(
    ("values", "feature", "labels", "problem", "first"),
    [
        (["no", "yes", "maybe"], None, ("maybe", "no", "yes"), SINGLE, [1, 2, 0]),
        ([False, True, True], None, ("False", "True"), SINGLE, [0, 1, 1]),
        ([2, 0, 1], None, ("LABEL_0", "LABEL_1", "LABEL_2"), SINGLE, [2, 0, 1]),
        ([5, 10, 1], None, ("1", "5", "10"), SINGLE, [1, 2, 0]),
        ([-1, 1, 1], None, ("-1", "1"), SINGLE, [0, 1, 1]),
        (["10", "9", "9"], None, ("10", "9"), SINGLE, [0, 1, 1]),
        ([1, 0, 1], ClassLabel(names=["7", "0", "never"]), ("7", "0", "never"), SINGLE, [1, 0, 1]),
        ([0.5, 2.0, -1.0], None, (), REGRESSION, [0.5, 2.0, -1.0]),
        ([["b"], [], ["a", "b"]], None, ("a", "b"), MULTI, [[0, 1], [0, 0], [1, 1]]),
        ([[2], [0, 1], []], None, ("LABEL_0", "LABEL_1", "LABEL_2"), MULTI, [[0, 0, 1], [1, 1, 0], [0, 0, 0]]),
        ([[7, 3], [3], []], None, ("3", "7"), MULTI, [[1, 1], [1, 0], [0, 0]]),
        ([[0, 1, 1], [0, 0, 0]], None, ("LABEL_0", "LABEL_1", "LABEL_2"), MULTI, [[0, 1, 1], [0, 0, 0]]),
        ([[0.0, 1.0], [1.0, 1.0]], None, ("LABEL_0", "LABEL_1"), MULTI, [[0, 1], [1, 1]]),
        ([[True, False], [True, True]], None, ("LABEL_0", "LABEL_1"), MULTI, [[1, 0], [1, 1]]),
        ([[1], [0, 1]], List(ClassLabel(names=["x", "y"])), ("x", "y"), MULTI, [[0, 1], [1, 1]]),
        ([[1, 0], [0, 1]], List(ClassLabel(names=["x", "y"])), ("x", "y"), MULTI, [[1, 1], [1, 1]]),
    ],
)
def test_kinds_of_labels(
    tmp_path: Path, values: list[Any], feature: Any, labels: tuple[str, ...], problem: str, first: list[Any]
) -> None:
    labelled(tmp_path, values, values[:1], feature)
    facts, found = learnt(tmp_path, len(values))
    assert (facts.labels, facts.problem) == (labels, problem)
    assert found == first
    assert facts.settings == {"num_labels": len(labels) or 1}
    assert facts.notes[0].startswith(f"problem_type is {problem}, because `label` holds ")


def test_asking_turns_numbers_into_classes_or_classes_into_numbers(tmp_path: Path) -> None:
    labelled(tmp_path, [1.0, 0.0, 1.0], [1.0])
    facts, found = learnt(tmp_path, 3, problem_type=SINGLE)
    assert (facts.labels, found) == (("LABEL_0", "LABEL_1"), [1, 0, 1])
    labelled(tmp_path, [1, 0, 5], [1])
    assert learnt(tmp_path, 3, problem_type=REGRESSION)[1] == [1.0, 0.0, 5.0]


def test_whole_floats_with_gaps_are_named_as_integers(tmp_path: Path) -> None:
    labelled(tmp_path, [5.0, 1.0, 5.0], [1])
    facts, found = learnt(tmp_path, 3, problem_type=SINGLE)
    assert (facts.labels, found) == (("1", "5"), [1, 0, 1])


def test_classes_of_another_order_are_refused(tmp_path: Path) -> None:
    labelled(tmp_path, [0, 1, 1], None, ClassLabel(names=["x", "y"]))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["y", "x"])})
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=features)
    rows.to_parquet(tmp_path / "set/validation.parquet")
    assert refused(tmp_path)[1] == "validation.parquet: its classes are not those of train, or not in order"


def test_text_mistaken_for_a_label_is_cut_short(tmp_path: Path) -> None:
    labelled(tmp_path, ["a" * 500, "b"], ["c" * 500])
    assert refused(tmp_path)[1].startswith(f"validation.jsonl, row 1: the label `{'c' * 59}…` is in no training row")


def test_categories_of_pandas_are_names(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["x", "y", "z"] * 8, "label": pandas.Categorical(["b", "a", "b"] * 8)})
    (tmp_path / "set").mkdir()
    frame.to_parquet(tmp_path / "set/train.parquet")
    frame.to_parquet(tmp_path / "set/validation.parquet")
    facts, found = learnt(tmp_path, 3)
    assert (facts.labels, found) == (("a", "b"), [1, 0, 1])


def test_balance_is_told(tmp_path: Path) -> None:
    labelled(tmp_path, ["a"] * 9 + ["b"], ["a"])
    note = "2 labels in train: `a` is the commonest with 90.0% of them, `b` the rarest with 10.0%"
    assert note in learn(tmp_path).notes


@pytest.mark.parametrize(
    ("train", "validation", "feature", "asked", "said"),
    [
        ([0.5, 0.1], None, None, SINGLE, "train.jsonl, row 1: `label` is no class but a fraction (2 rows in all)"),
        (["a", "b"], None, None, REGRESSION, "regression needs a number in every row, but `label` of train.jsonl"),
        ([["a"], ["b"]], None, None, SINGLE, "needs one class in every row, but `label` of train.jsonl holds lists"),
        (["a", "b"], None, None, MULTI, "needs a list of labels in every row, but `label` of train.jsonl"),
        ([0, 1, -1], None, ClassLabel(num_classes=2), None, "train.parquet, row 3: `label` is -1, but there are 2 cl"),
        ([0, 1], [1, 2], None, None, "validation.jsonl, row 2: the label `2` is in no training row"),
        ([0, 1], [1, 2], ClassLabel(names=["x", "y", "z"]), None, "row 2: the label `z` is in no training row"),
        (["a", "b"], ["b", "a", "c", "c"], None, None, "row 3: the label `c` is in no training row (2 rows in all)"),
        ([-100, -100], None, None, None, "train.jsonl: every label is -100, which the loss ignores"),
        ([0, 1, -100], None, None, None, "train.jsonl, row 3: `label` is -100, which the loss ignores"),
        (["a", "a"], None, None, None, "train.jsonl: every row has the label `a`, so there is nothing to tell apart"),
        ([1, 1], None, ClassLabel(names=["x", "y"]), None, "every row has the label `y`"),
        ([0.5, 0.5], None, None, None, "every row has the label 0.5, so there is nothing to learn"),
        (["a", None, "b", None], None, None, None, "train.jsonl, row 2: `label` has no value (2 rows in all)"),
        ([0.5, float("nan"), 1.0], None, Value("float64"), None, "train.parquet, row 2: `label` has no value"),
        ([0.5, float("inf"), 1.0], None, Value("float64"), None, "train.parquet, row 2: `label` is infinite"),
        ([1, "a", 2], None, None, None, 'train.jsonl, row 2: `label` is "a", not int as above'),
        ([["a"], [None]], None, None, None, "train.jsonl, row 2: a label in `label` has no value"),
        ([[], []], None, None, None, "no row has a label"),
        ([[0, 0], [0, 0]], None, None, None, "no row has a label"),
        ([["a"], ["b"]], [["a"], ["b", "c"]], None, None, "validation.jsonl, row 2: the label `c` is in no training"),
        ([[0, 1], [1, 0]], [[1, 1], [1]], None, None, "row 2: `label` isn't a vector of 2 flags as in train"),
        ([[0, 1], [1, 0]], [[1, 2]], None, None, "validation.jsonl, row 1: `label` holds 2, neither 0 nor 1"),
        ([[0, 1], [1, 0]], [["a"]], None, None, "validation.jsonl: `label` holds names, but vectors in train"),
        ([[0.5, 1.0], [0.1, 2.0]], None, None, None, "lists of numbers that are not vectors of 0 and 1"),
        (["a", "b"], [0.5], None, None, "row 1: `label` is no class but a fraction"),
        (["a", "b"], [["a"]], None, None, "but `label` of validation.jsonl holds lists"),
        ([0.5, 1.5], ["a"], None, None, "but `label` of validation.jsonl holds string values"),
    ],
)
def test_labels_are_refused(
    tmp_path: Path, train: list[Any], validation: list[Any] | None, feature: Any, asked: str | None, said: str
) -> None:
    labelled(tmp_path, train, validation, feature)
    key, sentence = refused(tmp_path, **({"problem_type": asked} if asked else {}))
    assert key in ("data.columns.label", "task.problem_type")
    assert said in sentence


def test_row_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [{"text": f"film {index}", "label": index % 2} for index in range(20)]
    rows[16]["label"] = None
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"path": "a.jsonl", "splits": {"train": "train[:5]+train[10:]"}}
    with pytest.raises(PlanError, match=r"a\.jsonl, row 17: `label` has no value"):
        data.read(
            Recipe.model_validate({"model": "a/b", "task": {"type": "text-classification"}, "data": source}), tmp_path
        )


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a", "", "b"], "row 2: `text` is empty"),
        (["a", "b", " \t\n"], "row 3: `text` is empty"),
        (["a", None, "b", None], "row 2: `text` has no value (2 rows in all)"),
        (["a", "b", 3], "row 3: `text` is 3, not text"),
        ([1, 2, 3], "train.jsonl: `text` holds int64 values, not text"),
        ([["a"], ["b"], ["c"]], "train.jsonl: `text` holds list<"),
    ],
)
def test_texts_are_refused(tmp_path: Path, texts: list[Any], said: str) -> None:
    rows = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    tiny.write_jsonl(tmp_path / "set/train.jsonl", rows)
    key, sentence = refused(tmp_path)
    assert key == "data.columns.text"
    assert said in sentence


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    rows = [{"text": "", "text_pair": None if index else "b", "label": index % 2} for index in range(4)]
    tiny.write_jsonl(tmp_path / "set/train.jsonl", rows)
    with pytest.raises(PlanError) as caught:
        learn(tmp_path)
    assert len(caught.value.problems) == 2


# Batches


@pytest.mark.parametrize(
    ("values", "dtype", "shape"),
    [
        (["a", "b", "a"], torch.int64, (3,)),
        ([["a"], ["a", "b"], []], torch.float32, (3, 2)),
        ([0.5, 1.0, 2.0], torch.float32, (3,)),
    ],
)
def test_batch_gives_the_model_a_loss(tmp_path: Path, values: list[Any], dtype: torch.dtype, shape: tuple[int]) -> None:
    labelled(tmp_path, values, values[:1])
    rows, task = learn(tmp_path), recipe().task
    examples = data.encode(rows, task, tiny.tokenizer()).train.examples([0, 1, 2])
    examples[1] = {**examples[1], **tiny.tokenizer()("the film is very very good")}
    batch = task.collate(tiny.tokenizer())(examples)
    assert (batch["labels"].dtype, tuple(batch["labels"].shape)) == (dtype, shape)
    assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]
    model = tiny.bert(problem_type=rows.facts.problem, **{"num_labels": 2, **rows.facts.settings})
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    assert task.weight(batch) == 3


def test_pair_is_one_input_and_shares_the_limit(tmp_path: Path) -> None:
    rows = [{"premise": "the film is good", "hypothesis": "no fun", "label": index % 2} for index in range(12)]
    tiny.write_jsonl(tmp_path / "set/train.jsonl", rows)
    example = data.encode(learn(tmp_path), recipe().task, tiny.tokenizer()).train.examples([0])[0]
    assert example["token_type_ids"] == [0] * 6 + [1] * 3
    short = recipe(max_length=7)
    cut = data.encode(data.read(short, tmp_path), short.task, tiny.tokenizer())
    assert len(cut.train.examples([0])[0]["input_ids"]) == 7


def test_limit_beyond_the_model_is_refused(tmp_path: Path) -> None:
    labelled(tmp_path, ["a", "b"], ["a"])
    long = recipe(max_length=33)
    with pytest.raises(PlanError, match="the model reads 32 tokens at most, not 33; write 32"):
        data.encode(data.read(long, tmp_path), long.task, tiny.tokenizer())


def test_tokenizer_without_padding_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(PlanError, match="no padding token"):
        recipe().task.collate(tokenizer)


# Metrics


def test_metrics_of_classes() -> None:
    scores = np.array(
        [[2, 1, 0], [0, 2, 1], [0, 2, 1], [3, 0, 1], [0, 1, 2]], dtype=np.float64
    )  # in float32 ties would break
    references, decided = np.array([0, 1, 2, 0, 0]), [0, 1, 1, 0, 2]
    found = metrics.compute(metrics.serving(SINGLE), SINGLE, scores, references)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(references, decided, average="macro"))
    assert found["recall"] == found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["matthews_correlation"] == pytest.approx(sklearn.metrics.matthews_corrcoef(references, decided))
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert found["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(references, shares, multi_class="ovr"))


def test_metrics_of_two_classes_rank_by_the_second() -> None:
    scores = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 5.0], [1.0, 0.5]])
    found = metrics.compute(("roc_auc", "accuracy"), SINGLE, scores, np.array([1, 0, 1, 1]))
    assert found == {"roc_auc": 1.0, "accuracy": 0.75}


def test_metrics_of_several_labels() -> None:
    scores = np.array([[1.0, -1.0], [-2.0, 3.0], [1.0, 1.0]])
    references = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    found = metrics.compute(metrics.serving(MULTI), MULTI, scores, references)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1_micro"] == pytest.approx(6 / 7)
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["roc_auc"] == 1.0


def test_metrics_of_numbers() -> None:
    scores, references = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 4.0])
    found = metrics.compute(metrics.serving(REGRESSION), REGRESSION, scores, references)
    assert (found["mse"], found["mae"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], references)[0, 1])
    assert found["r2"] == pytest.approx(1 - 1 / np.sum((references - references.mean()) ** 2))


@pytest.mark.parametrize(
    ("name", "problem", "scores", "references"),
    [
        ("matthews_correlation", SINGLE, [[1, 0], [0, 1]], [1, 1]),
        ("roc_auc", SINGLE, [[1, 0], [0, 1]], [1, 1]),
        ("roc_auc", SINGLE, [[1, 0, 0], [0, 1, 0]], [0, 1]),
        ("roc_auc", MULTI, [[1, 0], [0, 1]], [[1, 0], [1, 0]]),
        ("pearson", REGRESSION, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ("spearman", REGRESSION, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
        ("r2", REGRESSION, [1.0], [1.0]),
        ("accuracy", SINGLE, [[1, float("nan")], [0, 1]], [0, 1]),
        ("mse", REGRESSION, [float("inf"), 1.0], [0.0, 1.0]),
        ("accuracy", SINGLE, np.zeros((0, 2)), []),
    ],
)
def test_undefined_metric_is_nan_and_silent(name: str, problem: str, scores: Any, references: Any) -> None:
    assert np.isnan(metrics.compute((name,), problem, scores, references)[name])


def test_one_class_predicted_throughout_is_a_verdict() -> None:
    found = metrics.compute(metrics.serving(SINGLE), SINGLE, [[1, 0], [1, 0]], [0, 1])
    assert (found["matthews_correlation"], found["precision"], found["roc_auc"]) == (0.0, 0.25, 0.5)


def test_which_way_is_better_and_what_is_unknown() -> None:
    assert [name for name in (*metrics.METRICS, "loss") if not metrics.greater_is_better(name)] == [
        "mse",
        "mae",
        "loss",
    ]
    assert metrics.unserved("loss", ()) is None
    assert metrics.unserved("f1", metrics.serving(SINGLE)) is None
    assert metrics.unserved("acc", metrics.serving(SINGLE)) == ("there is no metric `acc`", "did you mean `accuracy`?")
    assert metrics.unserved("mse", metrics.serving(SINGLE))[0] == "`mse` doesn't fit this task"
    for problem, names in metrics.DEFAULTS.items():
        assert set(names) <= set(metrics.serving(problem))


def test_a_declared_class_without_rows_is_told_of() -> None:
    said = labels._balance(Counter({"a": 3, "b": 1}), ("a", "b", "c"))
    assert said.endswith("`a` is the commonest with 75.0% of them, no row has `c`, so none can be learnt")
    assert labels._balance(Counter({"a": 3, "b": 1}), ("a", "b")).endswith("`b` the rarest with 25.0%")
