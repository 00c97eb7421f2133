"""Tokens that a recipe adds: rows that start near the mean, have to train, and are saved with their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from running import events, place, refused, run, stage
from torch import nn

from engine.modelling.vocabulary import grow
from engine.recipe import Recipe
from engine.records import Note, Proved

NEW = ["marvellous", "dreadful"]
TEXT = {"type": "text-generation", "max_length": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows() -> list[dict[str, Any]]:
    words = {"good": "marvellous", "bad": "dreadful"}
    return [{**row, "text": f"{row['text']} {words[row['label']]}"} for row in tiny.reviews(64)]


def folder(root: Path, model: nn.Module, prepares: Any = None) -> Path:
    place(root, model, rows()[:48], rows()[48:])
    if prepares:
        prepares.save_pretrained(root / "model")
    return root


MODELS = {
    "classifier": (tiny.bert, None, "text-classification", "AutoModelForSequenceClassification"),
    "tied": (tiny.gpt2, None, TEXT, "AutoModelForCausalLM"),
    "untied": (lambda: tiny.llama(vocab_size=len(tiny.byte_level())), tiny.byte_level, TEXT, "AutoModelForCausalLM"),
    "rows to spare": (tiny.llama, tiny.byte_level, TEXT, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("tied", "untied") else pytest.mark.slow) for n in MODELS]
)
def test_new_rows_train_and_are_saved_with_their_tokenizer(tmp_path: Path, name: str) -> None:
    make, prepares, task, auto = MODELS[name]
    root = folder(tmp_path, make(), prepares() if prepares else None)
    model = {"path": "model", "add_tokens": NEW[0], "add_special_tokens": [NEW[1]]}
    happened = run(root, model=model, task=task, freeze="@blocks", stages=[stage(steps=6)])
    assert events(happened, Proved)
    saved = root / "runs/recipe/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    ids = tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer("the film is marvellous", add_special_tokens=False)["input_ids"][-1] == ids[0]
    assert NEW[1] not in tokenizer.decode(ids, skip_special_tokens=True)
    trained = getattr(transformers, auto).from_pretrained(saved)
    table = trained.get_input_embeddings().weight
    assert len(table) == (320 if name == "rows to spare" else len(tokenizer))
    assert not torch.equal(table[ids[0]], table[ids[1]])
    assert any("2 new tokens" in note.sentence for note in events(happened, Note)) == (name != "rows to spare")
    if name == "tied":
        assert trained.get_output_embeddings().weight is table
    if name == "untied":
        assert len(trained.lm_head.weight) == len(tokenizer)


def test_they_start_near_the_mean_by_the_seed_alone() -> None:
    tokenizer = tiny.byte_level()
    tokenizer.add_tokens(NEW)
    recipe = Recipe.model_validate(
        {"model": {"path": "m", "add_tokens": tuple(NEW)}, "task": TEXT, "data": "d", "stages": (stage(),)}
    )
    grown = []
    for _ in range(2):
        model = tiny.llama(initializer_range=1.0, vocab_size=len(tokenizer) - 2)
        before = model.get_input_embeddings().weight.clone()
        assert grow(model, tokenizer, recipe) == ["2 new tokens start as the mean of the word embeddings"]
        grown.append(model.get_input_embeddings().weight)
        torch.rand(3)
    assert torch.equal(*grown)
    assert torch.equal(grown[0][: len(before)], before)
    torch.testing.assert_close(grown[0][-2:], before.mean(0).repeat(2, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "freeze", "stages"),
    [
        ("classifier", ["@embeddings", "@blocks"], [stage()]),
        ("classifier", "bert", [stage("head", unfreeze="@head"), stage("top", unfreeze="@blocks[-2:]")]),
        ("untied", "@head", [stage()]),
    ],
)
def test_rows_that_no_stage_trains_are_refused(tmp_path: Path, name: str, freeze: Any, stages: Any) -> None:
    make, prepares, task, _ = MODELS[name]
    root = folder(tmp_path, make(), prepares() if prepares else None)
    key, said = refused(root, model={"path": "model", "add_tokens": NEW}, task=task, freeze=freeze, stages=stages)
    table = "lm_head" if name == "untied" else "bert.embeddings.word_embeddings"
    assert key == ("model",)
    assert said.startswith(f"`{table}.weight` has rows for the tokens that are added, and no stage trains it")


def test_tokens_that_are_there_already_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, tiny.bert())
    key, said = refused(root, model={"path": "model", "add_tokens": [NEW[0], "film"]})
    assert (key, said) == (("model", "add_tokens", 1), "`film` is a token of the model already; leave it out")
    key, said = refused(root, model={"path": "model", "add_special_tokens": [NEW[0], NEW[0]]})
    assert (key, said.split(";")[0]) == (
        ("model", "add_special_tokens", 1),
        f"`{NEW[0]}` is a token of this list already",
    )
