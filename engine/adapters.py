"""Adapters: small trainable additions to frozen modules. PEFT makes them; a recipe says which kind and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field

from engine.part import Part, Patterns

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class Adapter(Part):
    """One kind of adapter and the modules it goes to. Every further key is a field of that kind's PEFT config class."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """PEFT's name of the kind in lower case: `lora`, `ia3`, `vera`, ..."""
    target_modules: Patterns = ()
    """Patterns of the modules to adapt; only those that some stage unfreezes get one."""
    exclude_modules: Patterns = ()
    """Patterns of modules to leave out."""

    @property
    def fields(self) -> dict[str, Any]:
        """The keys that are PEFT's own."""
        return dict(self.__pydantic_extra__ or {})


SPOKEN_FOR = {
    "modules_to_save": "unfreeze these modules in a stage",
    "bias": "unfreeze `@biases` in a stage",
    "trainable_token_indices": "unfreeze the embeddings in a stage",
    "layers_to_transform": "name the layers in `target_modules`",
    "layers_pattern": "name the layers in `target_modules`",
    "target_parameters": "name modules in `target_modules`",
    "inference_mode": "what trains is what stages unfreeze",
    "peft_type": "that is `type`",
}
"""Fields of PEFT's configs that a recipe has its own words for: here they would do nothing, or break the names."""


def config(kind: str, fields: dict[str, Any], targets: Sequence[str]) -> PeftConfig:
    """The real PEFT config of an adapter on exactly the named modules.

    Raises `ValueError` in the user's words: an unknown kind, a field its config class doesn't have, a value it refuses.
    """
    from dataclasses import fields as fields_of

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    kinds = {peft_type.value.lower(): peft_type for peft_type in PeftType}
    if kind not in kinds:
        raise ValueError(f"`{kind}` is no adapter of the installed PEFT; it has {', '.join(sorted(kinds))}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[kind]]
    known = {field.name for field in fields_of(config_class)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"`{unknown[0]}` is no field of PEFT's {config_class.__name__}; it has {', '.join(sorted(known))}"
        )
    if field := next((name for name in SPOKEN_FOR if fields.get(name, "none") != "none"), None):
        raise ValueError(f"`{field}` has no say in a recipe: {SPOKEN_FOR[field]}")
    if kind == "adalora":
        raise ValueError("`adalora` spends its budget of ranks in a call after each step, and no stage makes one")
    if (start := fields.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(f"`init_lora_weights: {start}` rewrites the weights below it, but frozen ones never move")
    if "target_modules" not in known:
        raise ValueError(f"`{kind}` goes to a model as a whole and not to modules; stages can't freeze or thaw it yet")
    try:
        return config_class(target_modules=list(targets), **fields)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT refuses it: {error}") from error


def attach(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Put an adapter called `name` on the modules its config lists, in place, beside those that are there already.

    Raises `ValueError` where PEFT can't.
    """
    from warnings import catch_warnings, filterwarnings

    from peft import inject_adapter_in_model

    try:
        with catch_warnings():
            filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what a recipe may ask for
            inject_adapter_in_model(config, model, adapter_name=name)
    except (NotImplementedError, RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"PEFT can't put it on this model: {' '.join(str(error).split())}") from error
    _activate(model)


def try_merging(model: nn.Module) -> None:
    """Merge a copy of one layer of each kind that is adapted, so that a run doesn't fail at its end.

    The copies hold zeros, so `model` may lie on the meta device. Raises `ValueError`.
    """
    from copy import deepcopy

    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {type(layer): layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    for kind, layer in layers.items():
        copy = deepcopy(layer).to_empty(device="cpu")
        for tensor in (*copy.parameters(), *copy.buffers()):
            tensor.data.zero_()
        try:
            copy.merge()
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            said = " ".join(str(error).split()) or "not implemented"
            what = f"PEFT can't merge it into a {kind.__name__} ({said}), so no run could save what it learned"
            raise ValueError(what) from error


def detach(model: nn.Module, how: str) -> None:
    """Take every adapter off, in place: `merge` adds what it learned to the weights, `drop` forgets it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if how == "merge":
                layer.merge(safe_merge=True)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)


def _activate(model: nn.Module) -> None:
    """Make every adapter of every layer take part in its forward pass: PEFT runs only the last one by itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(sorted({name for part in layer.adapter_layer_names for name in getattr(layer, part)}))


def adapted(model: nn.Module) -> set[str]:
    """Names, in the bare model, of the modules that hold an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.replace(".base_layer", "") for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
