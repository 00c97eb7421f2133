"""What a checkpoint's own papers may ask for: looked at before anything is built from them, refused in one sentence.

A config can ask for code, for kernels of a stranger, and claim sizes that no machine has; an index can name weights
that are pickles or lie elsewhere. Nothing here builds a model or reads a weight, and whatever loads one can't unpickle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import ENVIRONMENT, PlanError, Problem, RunError
from engine.recipe import Model

MOST_LAYERS = 1000
"""Deeper than any model that is known, and built in seconds."""
MOST_PARAMETERS = 10**13
"""Ten million million: more than any model has."""
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"

_LAYERS = re.compile(r"(num|n)_.*(layers?|blocks?)|n_layers?|depths?")
_WEIGHTS = re.compile(r"[\w][\w. -]*\.safetensors")


def refuse_config(model: Model, written: Any) -> None:
    """Raise `PlanError` where a config.json asks for code or kernels, or is deeper than a model can be."""
    if not isinstance(written, Mapping):
        raise _refusal(model, "has a config.json that is no mapping", "download it again")
    for key, value in _entries(written):
        if key in ("auto_map", "trust_remote_code") and value:
            what = f"asks for code of its own (`{key}` in its config.json), which never runs here"
            then = f"take a model that transformers knows itself, or a copy without `{key}` if its own class is meant"
            raise _refusal(model, what, then)
        if key.endswith("attn_implementation") and isinstance(value, str) and re.search("[/:@]", value):
            what = f"asks for kernels of another repository (`{key}` in its config.json), which never run here"
            raise _refusal(model, what, f"take a copy without `{key}`")
        if _LAYERS.fullmatch(key) and any(count > MOST_LAYERS for count in _numbers(value)):
            what = f"claims more than {MOST_LAYERS:,} layers (`{key}` in its config.json)"
            raise _refusal(model, what, "download its config anew")


def refuse_parts(model: Model, config: Any) -> None:
    """Raise `PlanError` where a config has an inner one that its kind of model doesn't know."""
    if isinstance(config.get_text_config(), Mapping):
        what = "has a config.json with parts that its kind of model doesn't have"
        raise _refusal(model, what, "download it again, or take another")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, those of inner configs included."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _numbers(value: Any) -> list[int]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]


def refuse_weights(model: Model, place: str) -> None:
    """Raise `PlanError` where a checkpoint is an adapter, or its index names what is no safetensors file beside it."""
    if _paper(model, place, ADAPTER):
        what = "is an adapter and no whole model, and says itself where its base would lie"
        raise _refusal(model, what, "merge it into its base (`merge_and_unload`), save that and name it")
    if not (index := _paper(model, place, INDEX)):
        return
    try:
        files = set(json.loads(Path(index).read_bytes())["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(model, f"has an {INDEX} that can't be read", "download it again") from error
    for file in files:
        if not isinstance(file, str) or not _WEIGHTS.fullmatch(file):
            what = f"has an {INDEX} that names `{file}`, which is no safetensors file beside it"
            raise _refusal(model, what, "save it anew with `save_pretrained`")


def has(model: Model, place: str, name: str) -> bool:
    """Whether a checkpoint has a file; looked for only where it makes a difference, beside a GGUF file."""
    return model.gguf_file is not None and _paper(model, place, name) is not None


def _paper(model: Model, place: str, name: str) -> str | None:
    """A file of a checkpoint if there is one: of its folder, of the cache, or of the Hub."""
    from transformers.utils import cached_file

    quiet = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(
        place, name, revision=model.revision, **{f"_raise_exceptions_for_{kind}": False for kind in quiet}
    )


def refuse_size(model: Model, bones: nn.Module) -> None:
    """Raise `PlanError` for a skeleton larger than any model."""
    if (size := sum(each.numel() for each in bones.parameters())) > MOST_PARAMETERS:
        raise _refusal(model, f"claims {size:,} parameters in its config.json", "download its config anew")


def refuse_memory(model: Model, bones: nn.Module) -> None:
    """Raise `RunError` where the weights alone take more memory than the machine has."""
    needed = sum(each.numel() for each in bones.parameters()) * getattr(torch, model.dtype).itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        what = f"{model.path} needs {needed / 1e9:,.0f} GB for its weights and this machine has {there / 1e9:,.0f} GB"
        raise RunError(f"{what}; take a smaller model, or a larger machine", ENVIRONMENT)


@contextmanager
def no_pickles(model: Model) -> Iterator[None]:
    """Inside, `torch.load` refuses: whatever way leads there, nothing is unpickled."""

    def refuse(*_: Any, **__: Any) -> None:
        what = "has weights that are pickles, which are never opened"
        raise _refusal(model, what, "save it anew with `save_pretrained`")

    held, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = held


def _refusal(model: Model, what: str, then: str) -> PlanError:
    return PlanError([Problem(("model", "path"), f"{model.path} {what}", then)])
