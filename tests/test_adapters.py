"""Adapters on a model and off it again: what they add, what they leave alone, what PEFT may not decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from running import events, place, refused, run, stage
from safetensors.torch import load_file
from torch import nn

from engine import adapters, freezing
from engine.keeping.proof import digests
from engine.records import Proved

TARGETS = [f"bert.encoder.layer.{index}.attention.self.{name}" for index in (2, 3) for name in ("query", "value")]
TEXT = {"input_ids": torch.tensor([[2, 5, 7, 9, 3]])}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "dora": {"r": 2, "use_dora": True},
    "rslora": {"r": 2, "use_rslora": True},
    "ia3": {},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "hra": {"r": 2},
    "delora": {"r": 2},
    "ln_tuning": {},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def put(model: nn.Module, name: str, targets: list[str] = TARGETS, called: str = "") -> set[str]:
    """Attach an adapter; the names of the parameters that it brings."""
    before = set(freezing.parameters(model))
    kind = "lora" if name.endswith("ora") and name != "delora" else name
    adapters.attach(model, called or name, adapters.config(kind, KINDS[name], targets))
    assert before <= set(freezing.parameters(model)), "names are still those of the bare model"
    return set(freezing.parameters(model)) - before


def disturb(model: nn.Module, names: set[str]) -> None:
    """As if they had trained."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in freezing.parameters(model).items():
        if name in names:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", KINDS)
def test_attached_changes_nothing_and_dropped_leaves_nothing(name: str) -> None:
    model = tiny.bert().eval()
    before, bits, kinds = model(**TEXT).logits, digests(model), [type(module) for module in model.modules()]
    new = put(model, name)
    assert new
    torch.testing.assert_close(model(**TEXT).logits, before)
    disturb(model, new)
    assert not torch.allclose(model(**TEXT).logits, before, atol=1e-9)
    adapters.detach(model, "drop")
    assert digests(model) == bits
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(**TEXT).logits, before)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("name", KINDS)
def test_merged_is_what_it_was_with_its_adapters(name: str) -> None:
    model = tiny.bert().eval()
    bits = digests(model)
    disturb(model, put(model, name))
    tuned = model(**TEXT).logits
    adapters.detach(model, "merge")
    torch.testing.assert_close(model(**TEXT).logits, tuned, atol=1e-6, rtol=0)
    moved = {key for key, digest in digests(model).items() if bits[key] != digest}
    assert {key.rpartition(".")[0] for key in moved} == set(TARGETS)


def test_two_adapters_take_part_side_by_side() -> None:
    model = tiny.bert().eval()
    before = model(**TEXT).logits
    for name, called in (("lora", "lora"), ("rslora", "lora2")):
        new = put(model, name, called=called)
        assert all(called in key.split(".") for key in new)
        disturb(model, new)
        after = model(**TEXT).logits
        assert not torch.equal(after, before)
        before = after
    adapters.detach(model, "merge")
    torch.testing.assert_close(model(**TEXT).logits, before, atol=1e-6, rtol=0)


def test_adapted_names_are_those_of_the_bare_model() -> None:
    model = tiny.bert()
    assert adapters.adapted(model) == set()
    put(model, "lora")
    assert adapters.adapted(model) == set(TARGETS)


@pytest.mark.parametrize("kind", ["adalora", "lily", "poly", "pvera", "prompt_tuning", "shira"])
def test_kinds_that_no_run_could_end_with(tmp_path: Path, kind: str) -> None:
    """Found before the first step, not when the model is to be saved."""
    adapter = {"type": kind, "target_modules": ["query"]}
    key, sentence = refused(place(tmp_path), adapters=[adapter])
    assert key == ("adapters", 0)
    assert sentence


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("modules_to_save", ["classifier"], "unfreeze these modules in a stage"),
        ("bias", "all", "unfreeze `@biases` in a stage"),
        ("layers_to_transform", [1], "name the layers in `target_modules`"),
        ("inference_mode", True, "what trains is what stages unfreeze"),
        ("init_lora_weights", "eva", "starts from data or quantized weights"),
        ("r", 0, "`r` should be a positive integer value"),
    ],
)
def test_fields_that_a_recipe_has_its_own_words_for(tmp_path: Path, field: str, value: Any, said: str) -> None:
    adapter = {"type": "lora", "target_modules": ["query"], field: value}
    key, sentence = refused(place(tmp_path), adapters=[adapter])
    assert key == ("adapters", 0)
    assert said in sentence


@pytest.mark.parametrize("then", ["merge", "keep", "drop"])
def test_frozen_weights_below_adapters(tmp_path: Path, then: str) -> None:
    """Dropped, they are as they were; merged or kept to the end, exactly the adapted ones have moved."""
    adapter = {"type": "lora", "target_modules": ["query"], "r": 2}
    stages = [
        stage("adapted", unfreeze="@blocks[-2:]", then=then),
        stage("head", freeze="bert", learning_rate=1e-3),
    ]
    happened = run(place(tmp_path), freeze=["@embeddings", "@blocks"], adapters=[adapter], stages=stages)
    before, after = (load_file(tmp_path / f"{folder}/model.safetensors") for folder in ("model", "runs/recipe/model"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    queries = {f"bert.encoder.layer.{index}.attention.self.query.weight" for index in (2, 3)}
    head = {name for name in before if name.startswith(("classifier", "bert.pooler"))}
    assert moved == head | (queries if then != "drop" else set())
    assert events(happened, Proved)[0].still >= len(before) - len(moved)
