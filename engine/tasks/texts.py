"""What the tasks over texts share: where a text is cut, what it lost there, and how a batch is padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import PlanError, Problem
from engine.tasks.base import TRUNCATED

IGNORED = -100
"""PyTorch's `ignore_index`: a token with this label teaches nothing."""
DEFAULT_LENGTH = 1024
"""Tokens of a text where a task needs a limit and neither recipe nor model sets a lower one."""
_LABELS = {"label": "labels", "label_ids": "labels"}
_UNLIMITED = 10**9
"""A tokenizer without a limit says 1e30."""


def limit(asked: int | None, processor: Any) -> int | None:
    """Tokens after which a text is cut, or None where neither recipe nor model sets a limit."""
    own = processor.model_max_length if processor.model_max_length < _UNLIMITED else None
    if asked and own and asked > own:
        what = f"the model reads {own:,} tokens at most, not {asked:,}"
        raise PlanError([Problem(("task", "max_length"), what, f"write {own} or leave the key out")])
    return asked or own


def truncated(encoded: Any) -> dict[str, list[bool]]:
    """The column `TRUNCATED` of what a tokenizer made of some texts; nothing where it doesn't tell."""
    lost = [bool(encoding.overflowing) for encoding in encoded.encodings or ()]
    return {TRUNCATED: lost} if lost else {}


def need_fast(processor: Any, what: str) -> None:
    """Raise `PlanError` where a tokenizer can't say which token comes from where, which `what` needs."""
    if not processor.is_fast:
        told = f"{what} needs to know which token comes from which word, and this model's tokenizer can't tell"
        raise PlanError([Problem(("model", "path"), told, "take a model with a tokenizer.json")])


def multiple(processor: Any, most: int | None) -> int | None:
    """What the length of a batch is rounded up to: tensor cores want multiples of 8.

    A limit that is none could be overrun, and the last position with it.
    """
    import torch

    if processor.pad_token is None:
        what = "its tokenizer has no padding token, so texts of different lengths can't share a batch"
        raise PlanError([Problem(("model", "path"), what)])
    return 8 if torch.accelerator.is_available() and (most or 8) % 8 == 0 else None


def padder(processor: Any, most: int | None) -> Callable[[Sequence[Any]], Any]:
    """The function that pads texts, and makes a tensor of every other field."""
    import torch
    from transformers.data.data_collator import pad_without_fast_tokenizer_warning

    rounded = multiple(processor, most)

    def pad(examples: Sequence[Any]) -> dict[str, Any]:
        # Asked for tensors, the tokenizer would look at each token in Python: a quarter of a head's step on kept rows.
        lists = pad_without_fast_tokenizer_warning(processor, list(examples), pad_to_multiple_of=rounded)
        return {_LABELS.get(key, key): torch.tensor(value) for key, value in lists.items()}

    return pad


def token_padder(processor: Any, most: int | None) -> Callable[[Sequence[Any]], Any]:
    """`padder` for examples with one label a token: padding has the label that is ignored."""
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(processor, pad_to_multiple_of=multiple(processor, most))


def closed(ids: list[int], processor: Any) -> list[int]:
    """A text's tokens with the one that ends a text behind them, where the tokenizer has one and hasn't set it."""
    end = processor.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
