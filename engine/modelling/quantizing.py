"""Frozen weights in 8 or 4 bits, by bitsandbytes or torchao and transformers' own config classes.

What no stage trains as weights is quantised while it is loaded, whatever thaws is not: so nothing quantised ever
trains. It never merges an adapter into such a weight, which would round away what was learned.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from engine.errors import PlanError, Problem
from engine.freezing import bare
from engine.plan import Plan
from engine.prompts import PROMPTS
from engine.recipe import Model, Recipe

KEY = ("model", "quantization_config")
METHODS = {"bitsandbytes": ("lora", "ia3", "hira", "randlora", "road"), "torchao": ("lora",)}
"""Library -> the kinds of adapters for whose layers PEFT has a way with its weights."""
SKIPS = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}
"""Library -> transformers' name of the field that says which modules stay as they are."""


def refuse(recipe: Recipe, plan: Plan) -> None:
    """Raise `PlanError` where a plan asks for more than quantised weights can give; nothing of it is read or loaded."""
    if recipe.model.quantization_config is None:
        return
    method = _method(recipe.model)
    problems = []
    for attachment in (attachment for stage in plan.stages for attachment in stage.attaches):
        if attachment.kind not in (*METHODS[method], *PROMPTS):
            able = ", ".join(METHODS[method])
            what = f"`{attachment.kind}` has no layers for weights quantised by {method}"
            problems.append(Problem(attachment.key, what, f"take one of {able}, or virtual tokens"))
        elif attachment.fields.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
            what = f"`init_lora_weights: {attachment.fields['init_lora_weights']}` rewrites weights that are quantised"
            problems.append(Problem(attachment.key, what, "leave it out"))
    for stage in plan.stages:
        if stage.then == "merge":
            what = f"stage `{stage.name}` merges adapters into quantised weights, which would round what they learned"
            problems.append(Problem(KEY, what, "`then: keep` saves them beside the model"))
    if problems:
        raise PlanError(problems)
    config(recipe.model, ())


def refuse_checkpoint(model: Model, written: Mapping[str, Any]) -> None:
    """Raise `PlanError` for a checkpoint that holds quantised weights: the numbers that could train are gone."""
    if found := written.get("quantization_config"):
        method = found.get("quant_method", "an unknown method") if isinstance(found, Mapping) else "an unknown method"
        what = f"{model.path} is quantised already ({method}), so its weights can't train"
        raise PlanError([Problem(("model", "path"), what, "take the original, and `model.quantization_config`")])


def config(model: Model, kept: Iterable[str]) -> Any:
    """transformers' own config of how weights are quantised, for all linear modules but those `kept` by full name.

    Raises `PlanError` in one sentence: a library that isn't here, a field that the class doesn't have, a value it
    refuses.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    method, fields = _method(model), dict(model.quantization_config or {})
    if find_spec(method) is None:
        what = f"weights are quantised with the package `{method}`, which is not installed"
        raise PlanError([Problem(KEY, what, f"run `pip install frostline[{method}]`")])
    logging.getLogger(method).setLevel(logging.ERROR)  # it tells of each product that it casts its input
    skips = fields.get(SKIPS[method]) or []
    fields[SKIPS[method]] = [*skips, *(rf"{re.escape(name)}(\.weight)?$" for name in kept)]
    if method == "torchao":
        fields["quant_type"] = _torchao(fields.get("quant_type"))
    try:
        made = AutoQuantizationConfig.from_dict(fields)
    except (TypeError, ValueError, AttributeError, AssertionError, ImportError) as error:
        raise _refusal(error) from error
    if unknown := sorted(set(fields) - set(made.to_dict()) - {"quant_method"}):
        raise PlanError([Problem(KEY, f"`{unknown[0]}` is no field of transformers' {type(made).__name__}")])
    return made


def _refusal(error: Exception) -> PlanError:
    return PlanError([Problem(KEY, f"transformers refuses it: {' '.join(str(error).split())[:300]}")])


def _method(model: Model) -> str:
    fields = model.quantization_config or {}
    bits = fields.get("load_in_4bit") or fields.get("load_in_8bit")
    method = fields.get("quant_method") or ("bitsandbytes" if bits else None)
    if method not in METHODS:
        what = "`quant_method` has to be `bitsandbytes` or `torchao`"
        raise PlanError([Problem(KEY, what, "write `{quant_method: bitsandbytes, load_in_4bit: true}`")])
    if method == "bitsandbytes" and not bits:
        raise PlanError([Problem(KEY, "bitsandbytes quantises to 8 or 4 bits", "add `load_in_4bit: true`")])
    if model.gguf_file:
        raise PlanError([Problem(KEY, "a GGUF file is unpacked as it is read", "leave one of the two keys out")])
    return method


def _torchao(kind: Any) -> dict[str, Any]:
    """torchao's own writing of a config, for the name of its class or that name with its fields."""
    name, fields = next(iter(kind.items())) if isinstance(kind, dict) and len(kind) == 1 else (kind, {})
    from torchao import quantization  # pyright: ignore[reportMissingImports]

    if not (isinstance(name, str) and name.endswith("Config") and hasattr(quantization, name)):
        known = ", ".join(sorted(each for each in dir(quantization) if each.endswith("WeightOnlyConfig")))
        raise PlanError([Problem((*KEY, "quant_type"), f"`{name}` is no config of torchao; it has {known}, ...")])
    version = getattr(getattr(quantization, name), "version", 1)
    return {"default": {"_type": name, "_version": version, "_data": dict(fields or {})}}


def weights(model: Model, plan: Plan | None, bones: nn.Module | None) -> dict[str, Any]:
    """What a model's `from_pretrained` is told; nothing where nothing is quantised, or nobody knows what will train."""
    if model.quantization_config is None or plan is None or bones is None:
        return {}
    return {"quantization_config": config(model, _kept(plan, bones))}


def _kept(plan: Plan, bones: nn.Module) -> list[str]:
    """Modules that stay as they are: those whose weights some stage trains, and what makes words of an output."""
    trained = {name for stage in plan.stages for name in stage.trainable}
    head = getattr(bones, "get_output_embeddings", lambda: None)()
    return [
        bare(name)
        for name, module in bones.named_modules()
        if f"{bare(name)}.weight" in trained or (head is not None and module is head)
    ]


def quantized(model: nn.Module) -> bool:
    """Whether a model holds quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def packed(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each quantised weight in the bare model -> the module that holds it."""
    if not quantized(model):
        return {}
    held = [(bare(name), module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {f"{name}.weight": module for name, module in held if _quantized(module.weight)}


def _quantized(weight: nn.Parameter) -> bool:
    kind = type(weight)
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def unpacked(module: nn.Module) -> torch.Tensor:
    """The weight of a module with quantised weights, as numbers again; the module keeps its own."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)
