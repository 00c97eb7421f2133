"""Preferences: of two answers to one prompt the chosen becomes likelier than the rejected (DPO, Rafailov et al. 2023).

Both are weighed against the model as it was before anything trained. It is asked once, before the first step, so no
second model is kept: what every answer was worth to it stands beside the answer from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import Problem
from engine.tasks import chats
from engine.tasks.base import Table
from engine.tasks.columns import not_text
from engine.tasks.texts import IGNORED

SIDES = ("chosen", "rejected")
"""The two rows of an example, in this order."""
REFERENCE = "reference"
"""The column of what each answer was worth: its log-probability by the model as it was."""
METRICS = ("accuracy", "margin")


def bad_rows(table: Table) -> list[Problem | None]:
    """The problems of the two columns: texts that answer a `prompt`, or chats whose ends differ."""
    if any(chats.looks_like(table, side) for side in SIDES):
        return [chats.bad_chats(table, side) for side in SIDES]
    if "prompt" not in table.columns:
        what = f"{table.name}: `chosen` and `rejected` are texts, and there is no `prompt` that they answer"
        return [Problem(("data", "columns", "prompt"), what, "write `columns: {prompt: ...}`, or make chats of them")]
    return [not_text(table, name) for name in ("prompt", *SIDES)]


def halves(rows: Mapping[str, Sequence[Any]]) -> tuple[str, dict[str, list[Any]]]:
    """Whether the rows are `chat` or `completion`, and twice as many rows of that form: chosen, rejected, and so on."""
    answers = [answer for pair in zip(*(rows[side] for side in SIDES), strict=True) for answer in pair]
    if not isinstance(answers[0], str):
        # What both chats begin with is as likely before either end: it takes no part in the difference.
        return "chat", {"messages": answers}
    return "completion", {"prompt": [prompt for prompt in rows["prompt"] for _ in SIDES], "completion": answers}


def likelihoods(logits: Any, labels: Any) -> Any:
    """The log-probability of each row's live tokens together (rows,), in float32."""
    import torch
    from torch.nn.functional import cross_entropy

    # One row at a time and live tokens alone: in float32, a batch of logits would need twice its memory.
    pairs = (
        (row[live != IGNORED], live[live != IGNORED]) for row, live in zip(logits[:, :-1], labels[:, 1:], strict=True)
    )
    return torch.stack([-cross_entropy(row.float(), live, reduction="sum") for row, live in pairs])


def margins(found: Any, reference: Any, beta: float) -> Any:
    """How much more than before each chosen answer is worth than the rejected (examples,)."""
    gained = found - reference
    return beta * (gained[0::2] - gained[1::2])


def score(margins: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """The share of examples whose chosen answer gained more than the rejected, and by how much in the mean."""
    found = {"accuracy": sum(margin > 0 for margin in margins), "margin": sum(margins)}
    return {name: float(found[name]) / len(margins) for name in names}
