"""What a model's config.json says of its size, where it lies on this machine; nothing is downloaded."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


def layers(model: str) -> int:
    """The number of layers of a model in a folder or in the Hub's cache; 0 where it can't be known."""
    return next((said for key in LAYERS if isinstance(said := _config(model).get(key), int)), 0)


def tied(model: str) -> bool | None:
    """Whether input and output embeddings are one tensor; None where it can't be known."""
    return _config(model).get("tie_word_embeddings")


def _config(model: str) -> dict[str, Any]:
    """A model's config, as far as it lies on this machine; else nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    local: Any = Path(model) / "config.json"
    with suppress(OSError, ValueError, HFValidationError):
        if not local.is_file():
            local = try_to_load_from_cache(model, "config.json")
        if isinstance(local, str | Path):
            said = json.loads(Path(local).read_text(encoding="utf-8"))
            return said.get("text_config") or said
    return {}
