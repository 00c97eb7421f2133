"""What is hidden follows from the seed, the epoch and the example; what is judged from the example alone."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from running import events, place, run, stage
from torch.nn.functional import cross_entropy

from engine.errors import PlanError
from engine.records import Evaluated, StageStarted, Step
from engine.tasks import Facts
from engine.tasks.base import SEED
from engine.tasks.fill_mask import FillMask

TASK = "fill-mask"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def home(root: Path) -> Path:
    texts = [{"text": row["text"]} for row in tiny.reviews(96)]
    return place(root, tiny.bert(kind="BertForMaskedLM"), texts[:64], texts[64:])


def examples(count: int, **more: Any) -> list[dict[str, Any]]:
    task = FillMask(type=TASK)
    made = task.encode({"text": [row["text"] for row in tiny.reviews(count)]}, tiny.tokenizer(), Facts())
    made.pop("truncated")
    return [dict(zip(made, values, strict=True)) | more for values in zip(*made.values(), strict=True)]


def test_the_same_seed_hides_the_same_in_any_company() -> None:
    collate = FillMask(type=TASK).collate(tiny.tokenizer())
    alone = collate(examples(8, **{SEED: 7})[3:4])
    torch.manual_seed(99)
    among = collate(examples(8, **{SEED: 7}))
    width = alone["labels"].shape[1]
    assert torch.equal(among["labels"][3, :width], alone["labels"][0])
    assert torch.equal(among["input_ids"][3, :width], alone["input_ids"][0])
    other = collate(examples(8, **{SEED: 8}))
    assert not torch.equal(other["labels"], among["labels"])


def test_what_is_judged_is_always_the_same() -> None:
    collate = FillMask(type=TASK).collate(tiny.tokenizer())
    one, two = collate(examples(8)), collate(examples(8))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert set(one) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_the_share_that_is_hidden_and_how() -> None:
    given = examples(1500)
    batch = FillMask(type=TASK, mlm_probability=0.3).collate(tiny.tokenizer())(given)
    hidden = batch["labels"] != -100
    words = sum(1 - each for example in given for each in example["special_tokens_mask"])
    assert hidden.sum() / words == pytest.approx(0.3, abs=0.02)
    plain = tiny.tokenizer().pad(
        [{"input_ids": example["input_ids"]} for example in given], return_tensors="pt", padding_side="right"
    )["input_ids"]
    assert torch.equal(batch["labels"][hidden], plain[hidden])
    assert torch.equal(batch["input_ids"][~hidden], plain[~hidden])
    assert not (hidden & (plain < 5)).any()  # special tokens are never asked for
    masked = batch["input_ids"][hidden] == tiny.tokenizer().mask_token_id
    same = batch["input_ids"][hidden] == plain[hidden]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.03)
    assert same.float().mean() == pytest.approx(0.1 + 0.1 / tiny.VOCABULARY, abs=0.03)


def test_perplexity_is_over_hidden_tokens_and_not_over_batches() -> None:
    task, model = FillMask(type=TASK, mlm_probability=0.4), tiny.bert(kind="BertForMaskedLM").eval()
    collate, given = task.collate(tiny.tokenizer()), examples(24)
    with torch.no_grad():
        whole = collate(given)
        logits = model(**whole).logits
        loss = cross_entropy(logits.view(-1, logits.shape[-1]), whole["labels"].view(-1))
        parts = [collate(given[start : start + 5]) for start in range(0, 24, 5)]
        answers = [task.answers(task.forward(model, part), part) for part in parts]
    predictions = [row for part, _ in answers for row in part]
    references = [row for _, part in answers for row in part]
    found = task.score(predictions, references, ("perplexity", "accuracy"), Facts())
    assert found["perplexity"] == pytest.approx(exp(float(loss)), rel=1e-5)
    live = whole["labels"] != -100
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == whole["labels"])[live].float().mean()))
    assert sum(references) == task.weight(whole) == sum(map(task.weight, parts))


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(PlanError, match="no mask token"):
        FillMask(type=TASK).collate(tokenizer)


def test_runs_are_equal_masks_are_not_kept_and_it_learns(tmp_path: Path) -> None:
    keys = {"task": TASK, "freeze": "@blocks[:2]", "stages": [stage(epochs=5, learning_rate=1e-2)], "cache": "auto"}
    first, again = (run(home(tmp_path), **keys) for _ in range(2))
    assert events(first, StageStarted)[0].frozen == "computes in full: the examples are drawn anew in each epoch"
    assert [s.loss for s in events(first, Step)] == [s.loss for s in events(again, Step)]
    judged = [event.metrics for event in events(first, Evaluated)]
    assert judged == [event.metrics for event in events(again, Evaluated)]
    assert judged[-1]["perplexity"] < 0.8 * judged[0]["perplexity"]
    other = events(run(tmp_path, **keys, seed=1), Step)
    assert [s.loss for s in other] != [s.loss for s in events(first, Step)]


def test_a_shorter_micro_batch_takes_the_same_step(tmp_path: Path) -> None:
    """Masks hang on the example, so they are the same however the batch is cut; loss weighs by hidden tokens."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    home(tmp_path)
    tiny.save(tiny.bert(kind="BertForMaskedLM", **still), tmp_path / "model")
    keys = {"task": TASK, "training": {"logging_steps": 1}}
    whole, cut = (events(run(tmp_path, **keys, per_device_batch_size=size), Step) for size in (8, 3))
    assert [s.loss for s in whole] == pytest.approx([s.loss for s in cut], abs=1e-5)
