"""Activations that are computed again: the same gradients to the bit, less that is kept, nothing below the line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from test_forecast import bert, kept, texts
from test_frostline import staged
from test_prefix import Texts, collated
from torch import nn

from engine import freezing
from engine.adapters import attach
from engine.adapters import config as adapter_config
from engine.data import Split
from engine.frost.prefix import Cache
from engine.frost.recomputing import above, recomputed
from engine.frost.replay import Line
from engine.frost.shortcut import Shortcut, open_shortcut
from engine.frostline import find
from engine.modelling.outlining import outline
from engine.planning.forecast import Costs


def gradients(shortcut: Shortcut, batch: Any, fed: Callable[[], None] = lambda: None) -> dict[str, torch.Tensor]:
    shortcut.train_mode()
    shortcut.model.zero_grad()
    torch.manual_seed(3)
    with shortcut.replaying():
        fed()
        shortcut.model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in freezing.trainable(shortcut.model).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", ["half", "all but the first"])
@pytest.mark.parametrize("family", ["Bert cls", "T5 s2s", "GPT2 lm", "ViT cls", "ResNet cls"])
def test_gradients_are_the_same_to_the_bit(family: str, stage: str) -> None:
    """Dropout is on in what trains."""
    model, batch = staged(family, stage)
    found = find(model, batch)
    shortcut = Shortcut(model, found if isinstance(found, Line) else None)
    plain = gradients(shortcut, batch)
    shortcut.recompute()
    assert shortcut.recomputed
    assert equal(plain, gradients(shortcut, batch))


def test_gradients_are_the_same_above_a_replay_and_in_adapters(tmp_path: Path) -> None:
    model, _ = staged("Bert cls", "half")
    layers = [f"bert.encoder.layer.{place}.attention.self.query" for place in (2, 3)]
    attach(model, "lora", adapter_config("lora", {"r": 2, "init_lora_weights": False}, layers))
    freezing.obey(model, {name for name in freezing.parameters(model) if "lora" in name or "classifier" in name})
    split = Split(Dataset.from_list(Texts().rows))
    shortcut = open_shortcut(model, [split], collated, Cache(tmp_path / "kept"), 3, lambda no: no)
    assert shortcut.prefixes
    some = [0, 3, 5]
    batch = collated(split.examples(some))
    plain = gradients(shortcut, batch, lambda: shortcut.feed(split, some, batch))
    shortcut.recompute()
    assert [model.get_submodule(f"bert.encoder.layer.{place}") for place in (2, 3)] == list(shortcut.recomputed)
    assert equal(plain, gradients(shortcut, batch, lambda: shortcut.feed(split, some, batch)))


def test_only_what_gradients_pass_through_is_computed_again() -> None:
    model, batch = staged("Bert cls", "last")
    calls = [0] * 4

    def count(place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[place] += 1

        return hook

    for place, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_hook(count(place))
    with recomputed(above(model, None)):  # not even where nobody knows the line
        model.train()
        model(**batch).loss.backward()
    assert calls == [1, 1, 1, 2]


def test_whatever_happens_the_model_is_as_it_was() -> None:
    model = tiny.bert()
    with contextlib.suppress(KeyError), recomputed(above(model, None)):
        assert all("forward" in layer.__dict__ for layer in model.bert.encoder.layer)
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("length", [24, 96])
def test_less_is_kept_as_the_plan_says(length: int) -> None:
    model: nn.Module = bert()
    names = {name for name, _ in model.named_parameters() if "layer.0" not in name and "embeddings" not in name}
    freezing.obey(model, names)
    read, batch = outline(model), texts(length)
    costs, upper = Costs(read, names), Costs(read, {name for name in names if "layer.1" not in name})
    line = find(model, batch)
    assert isinstance(line, Line)
    with recomputed(above(model, line)):
        real = kept(model, batch) / 8
    # What one block holds while it is computed again comes on top of what is kept.
    block = costs.kept(length) - upper.kept(length)
    assert costs.kept(length, recomputed=True) - block == pytest.approx(real, rel=0.1)
    assert costs.kept(length, recomputed=True) < 0.6 * costs.kept(length)
