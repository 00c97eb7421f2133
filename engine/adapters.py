"""Adapters: small trainable additions to frozen modules. PEFT makes them; a recipe says which kind and where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field

from engine import prompts
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
    """Patterns of the modules to adapt; only those that some stage unfreezes get one. Kinds of virtual tokens
    (`prompt_tuning`, `p_tuning`, `prefix_tuning`, `cartridge`) have none: they train from the stage that lists them to
    the one that drops them, whatever is frozen."""
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
    "tokenizer_name_or_path": "the model's own tokenizer reads the text",
    "tokenizer_kwargs": "the model's own tokenizer reads the text",
}
"""Fields of PEFT's configs that a recipe has its own words for: here they would do nothing, or break the names."""

WHOLE = "goes to a model as a whole and not to modules, which stages can't freeze or thaw: take a kind with targets"
READ = "is made from the values of the weights below it, so nothing could be planned before they are read"
UNFIT = {
    "adalora": "spends its budget of ranks in a call after each step, and no stage makes one",
    "adamss": READ,
    "adaption_prompt": WHOLE,
    "cpt": "holds its tokens back in each forward pass, even where nothing trains, so no proof would hold",
    "frod": READ,
    "lily": "can't be merged into weights, so no run could save what it learned",
    "multitask_prompt_tuning": "wants the number of a task with each example, and a recipe has one task",
    "poly": "wants the number of a task with each example, and a recipe has one task",
    "pvera": "merges into other weights than it computes with, so no run could save what it learned",
    "shadow": WHOLE,
    "shira": READ,
    "supertuning": "passes over the hooks of the layers below it, and replaying a frozen prefix hangs on these",
    "trainable_tokens": "trains rows of the word embeddings: unfreeze `@embeddings` in a stage",
}
"""Kinds of PEFT's that no stage can train, and why."""

STARTS = ("True", "False", "gaussian", "orthogonal", "olora", "pissa")
"""Values of LoRA's `init_lora_weights`; `pissa_niter_<n>` is one more. All others want data or quantized weights."""


def rewrites(fields: dict[str, Any]) -> bool:
    """Whether an adapter takes its start out of the weights below it (PiSSA, OLoRA): only a merge puts that back."""
    start = fields.get("init_lora_weights", True)
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


TUNERS = "_tuners"
"""Where a model keeps PEFT's tuner of each of its adapters: what the layers of one share is known to it alone."""


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
    if ("target_modules" not in known and kind not in prompts.PROMPTS) or kind in UNFIT:
        raise ValueError(f"`{kind}` {UNFIT.get(kind, WHOLE)}")
    start = str(fields.get("init_lora_weights", True))
    if start not in STARTS and not re.fullmatch(r"pissa_niter_\d+", start):
        raise ValueError(f"`init_lora_weights: {start}` starts from data or quantized weights, and a recipe has none")
    aims: dict[str, Any] = {} if kind in prompts.PROMPTS else {"target_modules": list(targets)}
    if fields.get("prompt_tuning_init") == "TEXT":
        aims["tokenizer_name_or_path"] = "."  # it is known when there is a model
    try:
        return config_class(**aims, **fields)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT refuses it: {error}") from error


def attach(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Put an adapter called `name` on the modules its config lists, in place, beside those that are there already.

    Raises `ValueError` where PEFT can't.
    """
    from warnings import catch_warnings, filterwarnings

    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if any(parameter.is_meta for parameter in model.parameters()) and rewrites(vars(config)):
        config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue]  there are no weights to rewrite
    try:
        with catch_warnings():
            filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what a recipe may ask for
            if config.is_prompt_learning:
                prompts.attach(model, name, config)
                return
            # The tuner itself, not `inject_adapter_in_model`: that refuses kinds whose layers share matrices (VeRA).
            kind = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # pyright: ignore[reportArgumentType]
            tuner = kind(model, config, adapter_name=name)
    except (NotImplementedError, RuntimeError, TypeError, IndexError, AttributeError, OSError) as error:
        raise ValueError(f"PEFT can't put it on this model: {' '.join(str(error).split())}") from error
    model.__dict__.setdefault(TUNERS, {})[name] = tuner  # past `nn.Module`: the model lies in its tuner already
    _activate(model)


def states(model: nn.Module) -> dict[str, tuple[PeftConfig, dict[str, Any]]]:
    """Adapter -> its config and its tensors, by the names that PEFT's own `save_pretrained` gives them."""
    from peft import get_peft_model_state_dict
    from torch import nn

    tuners = model.__dict__.get(TUNERS, {})
    configs = {name: tuner.peft_config[name] for name, tuner in tuners.items()}
    found = {}
    for name, tuner in tuners.items():
        wrapped = nn.Module()  # as a `PeftModel` wraps it, which is where names begin
        wrapped.base_model = tuner
        wrapped.__dict__["peft_config"] = configs
        kept = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
        found[name] = (configs[name], kept)
    return found | prompts.states(model)  # the last one: it goes around all others


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
    """Take every adapter off, in place: `merge` adds what it learned to the weights, `drop` forgets it.

    A prompt is forgotten in any case.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    prompts.detach(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if how == "merge":
                layer.merge(safe_merge=True)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for kept in ("peft_config", TUNERS):
        model.__dict__.pop(kept, None)


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
