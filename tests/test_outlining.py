"""What an outline says of a model: its parts by role, its forward order, its tied names, and what a pass costs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

from engine import adapters
from engine.modelling.outlining import TOKENS, outline, sample

XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": tiny.VOCABULARY, "num_labels": 2}
MODELS: dict[str, Any] = {
    "bert": tiny.bert,
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "t5": tiny.t5,
    "vit": tiny.vit,
    "resnet": tiny.resnet,
    "xlnet": lambda: transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**XLNET)),
}
ROLES = {
    "bert": (("bert.embeddings",), "bert.encoder.layer.", 4, ("classifier", "bert.pooler")),
    "gpt2": (("transformer.wte", "transformer.wpe"), "transformer.h.", 4, ("lm_head",)),
    "llama": (("model.embed_tokens",), "model.layers.", 4, ("lm_head",)),
    "vit": (("vit.embeddings",), "vit.layers.", 4, ("classifier",)),
    "resnet": (("resnet.embedder",), "resnet.encoder.stages.", 4, ("classifier",)),
    "xlnet": (("transformer.word_embedding",), "transformer.layer.", 2, ("sequence_summary", "logits_proj")),
}


def skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


@pytest.mark.parametrize("name", ROLES)
def test_parts_by_role(name: str) -> None:
    embeddings, block, count, head = ROLES[name]
    seen = outline(skeleton(name))
    assert seen.embeddings == embeddings
    assert seen.blocks == tuple(f"{block}{index}" for index in range(count))
    assert seen.head == head


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("t5", "xlnet")])
def test_order_is_that_of_a_forward_pass(name: str) -> None:
    seen = outline(skeleton(name))
    assert seen.measured
    order = {module.name: module.order for module in seen.modules}
    blocks = [order[block] for block in seen.blocks]
    assert blocks == sorted(blocks)
    assert all(order[part] < blocks[0] for part in seen.embeddings)
    called = [order[part] for part in seen.head if order[part] is not None]
    assert all(rank > blocks[-1] for rank in called)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_models(name: str) -> None:
    model = skeleton(name)
    seen = outline(model)
    assert seen.size == sum(parameter.numel() for parameter in model.parameters())
    assert [parameter.name for parameter in seen.parameters] == [name for name, _ in model.named_parameters()]
    assert set(seen.buffers) == {name for name, _ in model.named_buffers()}


def test_tied_names_are_one_parameter() -> None:
    aliases = {parameter.name: parameter.aliases for parameter in outline(skeleton("gpt2")).parameters}
    assert aliases["transformer.wte.weight"] == ("lm_head.weight",)
    assert "lm_head.weight" not in aliases
    assert sum(map(len, aliases.values())) == 1


def test_price_of_a_pass_is_two_flops_a_weight_and_token() -> None:
    seen = outline(skeleton("bert"))
    prices = {module.name: module.flops for module in seen.modules}
    tokens = tiny.POSITIONS - 2
    assert prices["bert.encoder.layer.0.intermediate.dense"] == 2 * tokens * 16 * 32
    assert prices["classifier"] == 2 * 16 * 2, "the head sees one token"
    assert prices["bert.encoder.layer.0"] == 0, "a module that only calls its children spends nothing itself"


def test_real_model_has_the_outline_of_its_skeleton() -> None:
    real, bones = outline(tiny.bert()), outline(skeleton("bert"))
    assert real.parameters == bones.parameters
    assert [(module.name, module.order) for module in real.modules] == [(m.name, m.order) for m in bones.modules]


def test_adapters_belong_to_the_modules_they_adapt() -> None:
    model = skeleton("bert")
    bare = outline(model)
    query = "bert.encoder.layer.3.attention.self.query"
    adapters.attach(model, "lora", adapters.config("lora", {"r": 2}, [query]))
    full = outline(model, (), bare)
    new = {parameter.name: parameter for parameter in full.parameters if parameter.adapter}
    assert {parameter.module for parameter in new.values()} == {query}
    assert {parameter.shape for parameter in new.values()} == {(2, 16), (16, 2)}
    assert full.size == bare.size
    assert full.modules == bare.modules


class Stubborn(transformers.BertForSequenceClassification):
    """What can't run without values: it looks into its inputs, and there are none on the meta device."""

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        return super().forward(input_ids, attention_mask=torch.ones(int(input_ids.max()) + 1), **more)


def test_what_can_not_be_traced_goes_by_definition() -> None:
    with torch.device("meta"):
        seen = outline(Stubborn(tiny.bert().config))
    assert not seen.measured
    assert all(module.order is None for module in seen.modules)
    assert len(seen.blocks) == tiny.BLOCKS
    prices = {module.name: module.flops for module in seen.modules}
    assert prices["bert.encoder.layer.0.intermediate.dense"] == 2 * TOKENS * 16 * 32


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("bert", "input_ids", (1, tiny.POSITIONS - 2)),
        ("xlnet", "input_ids", (1, TOKENS)),
        ("vit", "pixel_values", (1, 3, tiny.IMAGE, tiny.IMAGE)),
        ("t5", "decoder_input_ids", (1, TOKENS)),
    ],
)
def test_sample_fits_the_model(name: str, key: str, shape: tuple[int, ...]) -> None:
    assert sample(skeleton(name))[key].shape == shape
