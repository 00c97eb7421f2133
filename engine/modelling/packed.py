"""Weights from a GGUF file, as llama.cpp has them: unpacked by transformers' own reader while they are loaded.

What trains and what is saved are ordinary weights again. No kernel of another repository is fetched to keep
them packed.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import PlanError, Problem
from engine.recipe import Model

KEY = ("model", "gguf_file")
_NAME = re.compile(r"[\w][\w. +-]*\.gguf")
_LEFT = ("hf_quantizer", "quantization_method", "is_quantized")
"""What the reader leaves on a model, so that transformers would refuse to save it."""


def file(model: Model, place: str) -> dict[str, Any]:
    """What `from_pretrained` is told of the file, of a config as of a tokenizer; nothing where there is none.

    Raises `PlanError` where it can't be read: no such file beside the model, or no library for it.
    """
    if model.gguf_file is None:
        return {}
    if not _NAME.fullmatch(model.gguf_file):
        raise PlanError([Problem(KEY, f"`{model.gguf_file}` is no name of a GGUF file", "write one such as `m.gguf`")])
    if Path(place).is_dir() and not (Path(place) / model.gguf_file).is_file():
        beside = ", ".join(sorted(found.name for found in Path(place).glob("*.gguf"))) or "none"
        raise PlanError([Problem(KEY, f"{model.path} has no file `{model.gguf_file}`", f"GGUF files there: {beside}")])
    if find_spec("gguf") is None:
        what = "a GGUF file is read with the package `gguf`, which is not installed"
        raise PlanError([Problem(KEY, what, "run `pip install frostline[gguf]`")])
    return {"gguf_file": model.gguf_file}


def weights(model: Model, place: str) -> dict[str, Any]:
    """What a model's `from_pretrained` is told: every weight is unpacked, for a packed one can't train."""
    if model.gguf_file is None:
        return {}
    from transformers import GgufConfig

    return {**file(model, place), "quantization_config": GgufConfig(dequantize=True)}


def written(model: Model, place: str, folder_has_tokenizer: bool) -> dict[str, Any]:
    """What a tokenizer's `from_pretrained` is told: the folder's own is exact, so the file's is the second choice."""
    return {} if folder_has_tokenizer else file(model, place)


def forget(described: Model, model: nn.Module) -> list[str]:
    """Make a model that was unpacked an ordinary one, which can be saved; returns what there is to say of it."""
    if described.gguf_file is None:
        return []
    for name in _LEFT:
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # pyright: ignore
    return [f"weights are unpacked from {described.gguf_file}: what it rounded stays rounded"]
