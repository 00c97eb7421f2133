"""Several short texts in one example, none of which sees another, so that little of a batch is padding.

Each text counts its positions from 0. Where a batch has `position_ids` that start again and no attention mask,
transformers lets every text attend to itself alone. Nothing is cut here and no token is lost.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from engine.errors import PlanError, Problem
from engine.tasks.texts import IGNORED

Piece = tuple[list[int], list[int]]
"""The tokens of one text and the label of each."""


def windows(ids: list[int], most: int) -> list[list[int]]:
    """A text in pieces of at most `most` tokens; the last token of one is the first of the next.

    So each token but the very first is predicted exactly once.
    """
    starts = range(0, max(len(ids) - 1, 1), most - 1)
    return [ids[start : start + most] for start in starts]


def pack(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of pieces in groups of at most `most` tokens together, by best fit in decreasing order.

    Longest first, each goes where it leaves the least room (Ding et al. 2024, Fewer Truncations Improve Language
    Modeling). Groups and their members come in the order of the pieces.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, (lengths[index], -1))
        room, group = rooms.pop(place) if place < len(rooms) else (most, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        insort(rooms, (room - lengths[index], group))
    return sorted(sorted(group) for group in groups)


def joined(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """One example of several pieces; the first token of each has nothing before it that could predict it."""
    return {
        "input_ids": [token for ids, _ in pieces for token in ids],
        "labels": [label for _, labels in pieces for label in (IGNORED, *labels[1:])],
        "position_ids": [place for ids, _ in pieces for place in range(len(ids))],
    }


def refuse_leaks(model: Any) -> None:
    """Raise `PlanError` where a model lets packed texts see each other; of a skeleton only its signature is asked."""
    import inspect

    import torch

    key, then = ("task", "packing"), "write `packing: false`"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise PlanError([Problem(key, "this model takes no `position_ids`, so packed texts would run together", then)])
    weight = next(model.parameters())
    if weight.is_meta:
        return
    ids = torch.arange(8, device=weight.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        both = model(input_ids=ids, position_ids=torch.arange(8, device=ids.device)[None] % 4, use_cache=False).logits
        alone = model(input_ids=ids[:, 4:], use_cache=False).logits
    gap, scale = float((both[:, 4:] - alone).abs().max()), float(alone.abs().max())
    if not gap <= torch.finfo(weight.dtype).eps ** 0.5 * max(scale, 1e-6):
        raise PlanError([Problem(key, "this model lets packed texts see each other", then)])
