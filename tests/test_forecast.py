"""What a plan says of cost, held against what a real forward and backward pass takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from engine import freezing, models
from engine.frost.capturing import room
from engine.modelling.outlining import outline, sample
from engine.outline import Amount
from engine.planning.forecast import Costs, Sizes


def bert() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=200, **sizes))


def kept(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that a real forward pass in train mode keeps for the way back."""
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            alive.append(tensor)
        return tensor

    freezing.train_mode(model)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in alive)


def texts(length: int, rows: int = 8) -> dict[str, Any]:
    return {"input_ids": torch.ones(rows, length, dtype=torch.long), "labels": torch.zeros(rows, dtype=torch.long)}


@pytest.mark.parametrize("length", [24, 96, 200])
@pytest.mark.parametrize("part", ["everything", "upper half", "head", "biases"])
def test_activations_are_those_of_a_real_pass(part: str, length: int) -> None:
    model = bert()
    head, top = ("classifier", "bert.pooler"), ("bert.encoder.layer.2", "bert.encoder.layer.3")
    chosen = {
        "everything": lambda name: True,
        "upper half": lambda name: name.startswith((*head, *top)),
        "head": lambda name: name.startswith(head),
        "biases": lambda name: name.endswith("bias") and "embeddings" not in name,
    }[part]
    names = {name for name, _ in model.named_parameters() if chosen(name)}
    freezing.obey(model, names)
    real = kept(model, texts(length)) / 8
    said = Costs(outline(model), names).kept(length)
    assert said == pytest.approx(real, rel=0.05)


def test_language_models_keep_their_logits() -> None:
    model = tiny.gpt2()
    with_loss = kept(model, {"input_ids": torch.ones(8, 16, dtype=torch.long)} | {"labels": torch.ones(8, 16).long()})
    names = {name for name, _ in model.named_parameters()}
    assert Costs(outline(model), names).kept(16) == pytest.approx(with_loss / 8, rel=0.1)


def test_the_price_of_a_length_follows_from_two_others() -> None:
    found = {module.name: module.price for module in outline(bert()).modules}
    query = found["bert.encoder.layer.0.attention.self.query"].work
    assert query == Amount(linear=2 * 64 * 64)
    attention = found["bert.encoder.layer.0.attention.self"].work
    assert attention == Amount(square=4 * 64)
    assert found["classifier"].work == Amount(fixed=2 * 64 * 2)


def test_pictures_have_one_price() -> None:
    model = tiny.vit()
    prices = [module.price for module in outline(model).modules]
    assert all(price.keeps.linear == price.keeps.square == 0 for price in prices)
    names = {name for name, _ in model.named_parameters()}
    pictures = {"pixel_values": torch.zeros(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}
    assert Costs(outline(model), names).kept(0) == pytest.approx(kept(model, pictures) / 4, rel=0.05)


def test_an_outline_leaves_a_real_model_as_it_was() -> None:
    model = tiny.resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    outline(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]


def test_what_crosses_the_line_is_what_is_kept_on_disk() -> None:
    read, sizes = outline(bert()), Sizes(100, 10, mean=20, squared=400, longest=40)
    every = {p.name for p in read.parameters}
    head = {name for name in every if name.startswith(("classifier", "bert.pooler"))}
    top = head | {name for name in every if "layer.3" in name}
    assert Costs(read, head).crossing(sizes) == 64, "one row of an example is all that the head reads"
    assert Costs(read, top).crossing(sizes) == 20 * 64


def test_rows_that_are_kept_in_memory_count_as_far_as_there_is_room_for_them() -> None:
    assert Sizes(100, 20, example=1000, room=50_000).held == 50_000 + 20_000
    assert Sizes(100, 20, longest=30).held == 0


@pytest.mark.parametrize(("longest", "captured"), [(0, 16), (4, 64), (64, 8), (2048, 4)])
def test_a_forecast_captures_as_many_as_a_run(longest: int, captured: int) -> None:
    class Source:
        lengths = np.array([longest]) if longest else None

    assert Sizes(1, 0, longest=longest).captured == captured
    assert room(Source(), 64, processor=True)(0) == captured


def test_a_network_of_convolutions_is_tried_with_the_pictures_that_its_processor_makes() -> None:
    config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(config)
    made = transformers.ViTImageProcessorPil(size={"height": 96, "width": 64})
    model.sides = models._sides(made)
    assert sample(model)["pixel_values"].shape == (1, 3, 96, 64)
    assert models._sides(transformers.ViTImageProcessorPil(size={"shortest_edge": 80})) == (80, 80)
