"""Prompts: virtual tokens that train while the model stands still. PEFT makes them and leads every forward pass.

PEFT wraps a whole model for them, by which every name would change. Here the wrap lies beside the model: the model
keeps its names, holds what makes the virtual tokens as `virtual_tokens`, and has PEFT call it. It never merges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, wraps
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn

TOKENS = ("prompt_tuning", "p_tuning")
"""Kinds whose virtual tokens come before those of a text."""
KEYS = ("prefix_tuning", "cartridge")
"""Kinds whose virtual tokens are keys and values of each layer, so that outputs stay as long as inputs."""
PROMPTS = (*TOKENS, *KEYS)

_LABELLED: dict[str, str] = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}
_ALIGNED = {
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModel": "FEATURE_EXTRACTION",
}
"""What has an answer for each token of the text: PEFT doesn't take out those of virtual ones before a text."""
TASKS: Mapping[str, Mapping[str, str]] = dict.fromkeys(TOKENS, _LABELLED) | dict.fromkeys(KEYS, _LABELLED | _ALIGNED)
"""Kind -> class of models -> PEFT's own name of the task, which says how it leads a forward pass."""

HELD = "virtual_tokens"
"""What a model calls the module that holds what makes virtual tokens, by the name of each prompt."""
FIXED = ("frozen_embedding",)
"""Ends of names of what an encoder holds and its own config keeps from training."""
_WRAP, _WITHIN = "_prompts", "_led_by_prompts"


def refusal(kind: str, fields: Mapping[str, Any], auto: str, *, aims: bool, packed: bool, recomputed: bool) -> str:
    """Why a prompt of a kind can't train with a class of models, or the empty string.

    `aims` where it is given modules, `packed` where a row holds several texts, `recomputed` where activations are
    computed again on the way back.
    """
    if aims:
        return f"`{kind}` goes to no module: leave `target_modules` and `exclude_modules` out"
    if auto not in TASKS[kind]:
        able = ", ".join(sorted(TASKS[kind]))
        return f"`{kind}` has no way to lead {auto}; PEFT's serves {able}"
    wanted = ["num_virtual_tokens"]
    if kind == "p_tuning" or fields.get("prefix_projection"):
        wanted.append("encoder_hidden_size")
    for name in wanted:
        if not (isinstance(fields.get(name), int) and fields[name] > 0):
            return f"`{kind}` wants a whole number `{name}`"
    if packed:
        return f"`{kind}` belongs to one text, and `packing` puts several in a row"
    if recomputed and kind in KEYS:
        return f"`{kind}` hands each layer keys and values once, and `activation_checkpointing` asks for them again"
    return ""


def virtual_tokens(recipe: Any) -> int:
    """The most virtual tokens that any stage of a recipe has: positions that no text can have."""
    return max((int(each.fields.get("num_virtual_tokens") or 0) for each in listed(recipe)), default=0)


def listed(recipe: Any) -> list[Any]:
    """The prompts among a recipe's adapters."""
    stages = recipe.stages if isinstance(recipe.stages, tuple) else ()
    adapters = [*recipe.adapters, *(adapter for stage in stages for adapter in stage.adapters)]
    return [adapter for adapter in adapters if adapter.type in PROMPTS]


def attach(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Have PEFT lead the model's forward passes by a prompt called `name`, in place; of several, by the last.

    A run has one at a time, a skeleton those of all stages. Raises `ValueError` where a padded row would be read at its
    end.
    """
    from peft import get_peft_model
    from torch import nn

    if str(config.peft_type).lower().endswith(TOKENS) and config.task_type == "SEQ_CLS" and hasattr(model, "score"):
        what = "this model judges a text by its last token, which it can't tell from padding behind virtual tokens"
        raise ValueError(f"{what}: take `prefix_tuning`")
    if getattr(config, "prompt_tuning_init", None) == "TEXT":
        config.tokenizer_name_or_path = getattr(model, "name_or_path", "")  # pyright: ignore
        if any(parameter.is_meta for parameter in model.parameters()):
            config.prompt_tuning_init = "RANDOM"  # pyright: ignore  there are no words to start from
    with catch_warnings():
        filterwarnings("ignore", "Adapter name .* should not be contained")  # it isn't looked for by its name
        filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks by the older name
        wrap = get_peft_model(model, config, adapter_name=name)
    if of(model) is None:
        model.add_module(HELD, nn.ModuleDict())
        model.__class__ = _led(type(model))
    wrap.__dict__["heads"] = _unwrapped(model)
    model.get_submodule(HELD).add_module(name, wrap.prompt_encoder[name])  # pyright: ignore
    model.__dict__[_WRAP] = wrap  # past `nn.Module`: the model lies in its wrap already


def of(model: nn.Module) -> PeftModel | None:
    """PEFT's wrap of a model that has a prompt."""
    return model.__dict__.get(_WRAP)


def detach(model: nn.Module) -> None:
    """Take the prompt off, in place; what it learned is forgotten."""
    if of(model) is None:
        return
    del model.__dict__[_WRAP]
    delattr(model, HELD)
    model.__dict__.pop("prepare_inputs_for_generation", None)  # PEFT leaves it behind
    model.__class__ = type(model).__mro__[1]


def states(model: nn.Module) -> dict[str, tuple[PeftConfig, dict[str, Tensor]]]:
    """The prompt -> its config and its tensors, by the names that PEFT's own `save_pretrained` gives them.

    With it come those of the heads that PEFT saves with a prompt, and asks for when it loads one.
    """
    from copy import copy

    from peft import get_peft_model_state_dict

    if (wrap := of(model)) is None:
        return {}
    wrap.prompt_encoder.eval()  # pyright: ignore[reportCallIssue]  no dropout in what is kept
    name = wrap.active_adapter
    kept = get_peft_model_state_dict(wrap, adapter_name=name, save_embedding_layers=False)
    for head in wrap.__dict__["heads"]:
        held = model.get_submodule(head).state_dict()
        kept |= {f"base_model.{head}.{key}": tensor for key, tensor in held.items()}
    config = copy(wrap.peft_config[name])
    config.modules_to_save = None  # pyright: ignore[reportAttributeAccessIssue]  PEFT adds its own when it loads
    if getattr(config, "prompt_tuning_init", None) == "TEXT":  # the start is in the tensors
        config.prompt_tuning_init, config.tokenizer_name_or_path = "RANDOM", None  # pyright: ignore
    return {name: (config, kept)}


def _unwrapped(model: nn.Module) -> list[str]:
    """Names of the heads that PEFT has copied, to train the copy; each is put back as it was."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.original_module)
    return [name for name, _ in found]


@cache
def _led(kind: type) -> type:
    """The same class of models, whose forward passes and texts PEFT leads: it calls the model in its turn."""

    @wraps(kind.forward)  # pyright: ignore[reportAttributeAccessIssue]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get(_WITHIN):
            return kind.forward(self, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return _leading(self, "forward", *args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get(_WITHIN):
            return kind.generate(self, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        with catch_warnings():
            filterwarnings("ignore", "Position ids are not supported")  # transformers makes some for each text
            return _leading(self, "generate", *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "generate": generate, "__module__": kind.__module__})


def _leading(model: Any, verb: str, *args: Any, **kwargs: Any) -> Any:
    wrap, model.__dict__[_WITHIN] = model.__dict__[_WRAP], True
    config, labels = wrap.active_peft_config, kwargs.get("labels")
    ahead = config.num_virtual_tokens if str(config.peft_type.value).lower() in TOKENS else 0
    causal = ahead and config.task_type == "CAUSAL_LM"
    if causal and labels is not None:  # a text's first token has nothing before it, and counts nowhere
        kwargs["labels"] = labels.clone()
        kwargs["labels"][:, 0] = -100
    try:
        outputs = getattr(wrap, verb)(*args, **kwargs)
    finally:
        del model.__dict__[_WITHIN]
    if causal and verb == "forward":  # one for each token of the text
        outputs["logits"] = outputs["logits"][:, ahead:]
    return outputs
