"""Who trains, over 12 architectures, 4 selectors and 3 schedules: a plan and a model's own flags against a reference.

The reference reads module names alone. Which of them are blocks, embeddings and head is written down here, by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from engine.freezing import obey
from engine.modelling import outlining
from engine.modelling.outlining import outline
from engine.plan import make
from engine.planning.openings import entries
from engine.recipe import Recipe
from engine.schedules import StageEntry

TEXT = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
PICTURE = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
    "num_hidden_layers": 4,
}  # fmt: skip
STAGED = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


@dataclass(frozen=True)
class Architecture:
    """A model of four blocks; the roles are regular expressions over whole module names."""

    settings: Mapping[str, Any]
    blocks: str
    embeddings: str
    head: str
    auto: str = "AutoModelForSequenceClassification"

    def skeleton(self, kind: str) -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**self.settings)
        with torch.device("meta"):
            return getattr(transformers, self.auto).from_config(config)


def text(base: str, blocks: str, embeddings: str, head: str, **settings: Any) -> Architecture:
    return Architecture(TEXT | settings, rf"{base}\.{blocks}\.\d+", rf"{base}\.({embeddings})", head)


def picture(base: str, blocks: str, embeddings: str, **settings: Any) -> Architecture:
    names = rf"{base}\.{blocks}\.\d+", rf"{base}\.{embeddings}", "classifier"
    return Architecture(settings, *names, "AutoModelForImageClassification")


ARCHITECTURES = {
    "Bert": text("bert", r"encoder\.layer", "embeddings", r"classifier|bert\.pooler"),
    "Roberta": text("roberta", r"encoder\.layer", "embeddings", "classifier"),
    "Electra": text("electra", r"encoder\.layer", "embeddings", "classifier", embedding_size=32),
    "DistilBert": text("distilbert", r"transformer\.layer", "embeddings", "classifier|pre_classifier", dim=32,
                       n_layers=4, n_heads=2, hidden_dim=64),
    "DebertaV2": text("deberta", r"encoder\.layer", "embeddings", "classifier|pooler"),
    "ModernBert": text("model", "layers", "embeddings", "classifier|head", attention_bias=True),
    "GPT2": text("transformer", "h", "wte|wpe", "score", n_layer=4, n_embd=32, n_head=2),
    "Llama": text("model", "layers", "embed_tokens", "score", attention_bias=True),
    "ViT": picture("vit", "layers", "embeddings", **PICTURE),
    "Swin": picture("swin", r"encoder\.layers", "embeddings", image_size=64, embed_dim=8, depths=[1] * 4,
                    num_heads=[1] * 4, window_size=2),
    "ResNet": picture("resnet", r"encoder\.stages", "embedder", embedding_size=8, **STAGED),
    "ConvNext": picture("convnext", r"encoder\.stages", "embeddings", **STAGED),
}  # fmt: skip
SELECTORS = ("@blocks[-2:]", "@embeddings", "@norms", "@biases")
FROZEN = ("@embeddings", "@blocks")


def stage(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "epochs": 1, **keys}


SCHEDULES: Mapping[str, Callable[[str], Any]] = {
    "alone": lambda taken: (stage("head"), stage("alone", freeze="@head", unfreeze=taken)),
    "then": lambda taken: (stage("head"), stage("then", unfreeze=taken)),
    "again": lambda taken: (
        stage("head"), stage("in", unfreeze=taken), stage("out", freeze=taken, unfreeze="@blocks[0]"),
    ),
}  # fmt: skip
GENERATED = (
    {"type": "sliding", "blocks_per_stage": 2},
    {"type": "sliding", "blocks_per_stage": 1, "stride": 3, "direction": "up"},
    {"type": "lisa", "stages": 20, "seed": 3},
    {"type": "block_coordinate", "cycles": 2, "seed": 3},
    {"type": "surgical", "unfreeze": "@blocks[:2]", "head_epochs": 1.0},
)
"""Schedules that freeze again what they have opened, or that open a set of blocks alone."""


def reference(
    model: nn.Module, roles: Architecture, freeze: Sequence[str], stages: Sequence[StageEntry]
) -> Iterator[set[str]]:
    """Names of what trains in each stage."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    names = {name for name, _ in model.named_parameters()}

    def taken(selector: str) -> set[str]:
        if selector == "@biases":
            return {name for name in names if name.endswith(".bias")}
        if selector == "@norms":
            chosen = [name for name, kind in kinds.items() if "Norm" in kind]
        else:
            role, _, index = selector[1:].rstrip("]").partition("[")
            chosen = [name for name in kinds if re.fullmatch(getattr(roles, role), name)]
            bounds = [int(part) if part else None for part in index.split(":")]
            chosen = chosen[slice(*bounds)] if len(bounds) > 1 else chosen if bounds == [None] else [chosen[bounds[0]]]
        return {name for name in names if any(name.startswith(f"{module}.") for module in chosen)}

    now = names.difference(*map(taken, freeze))
    for each in stages:
        now = now.difference(*map(taken, each.freeze)).union(*map(taken, each.unfreeze))
        yield now


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_trains_is_what_module_names_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlining, "prices", lambda *_: {})  # most of an outline's time, and no part of who trains
    roles = ARCHITECTURES[kind]
    model = roles.skeleton(kind)
    seen = outline(model)
    asked = [make_stages(selector) for selector in SELECTORS for make_stages in SCHEDULES.values()]
    for stages in (*asked, *({"epochs": 1, **keys} for keys in GENERATED)):
        keys = {"model": "m", "task": "text-classification", "data": "d", "freeze": FROZEN, "stages": stages}
        recipe = Recipe.model_validate(keys)
        planned = make(recipe, seen, 100).stages
        wanted = list(reference(model, roles, FROZEN, [entry for entry, _ in entries(recipe, seen)]))
        assert [set(each.trainable) for each in planned] == wanted
        for each, names in zip(planned, wanted, strict=True):
            obey(model, each.trainable)
            assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
        assert len({frozenset(names) for names in wanted}) > 1
