"""A look at every picture and recording of a data set before anything else is done with it.

What can't be decoded is refused, or left out and told of; rows are chosen, and no file is changed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from datasets import Audio, Dataset, Image

from engine.errors import PlanError, Problem
from engine.rows.selection import Slice, without
from engine.tasks import pictures, sounds
from engine.tasks.base import Table
from engine.tasks.files import UnreadableError

MOST_NAMED = 3
"""Rows that a sentence names where there are more."""


def sift(part: Slice, columns: Mapping[str, str], on_bad_rows: str) -> tuple[Slice, list[str]]:
    """The slice with its pictures and sounds undecoded, each of which can be decoded, and a sentence on what was left.

    `columns` maps the task's names to the data's. Raises `PlanError` for what can't be decoded, unless `on_bad_rows` is
    `skip`.
    """
    bad: dict[int, str] = {}
    for name, column in columns.items():
        check = _check(part.rows.features[column])
        if check is None:
            continue
        feature = type(part.rows.features[column])(decode=False)
        part = Slice(part.name, part.rows.cast_column(column, feature), part.spans)
        found = _undecodable(part.rows, column, check)
        if found and on_bad_rows == "refuse":
            raise PlanError([Problem(("data", "columns", name), _said(part, found), "mend it, or `on_bad_rows: skip`")])
        bad |= found
    if not bad:
        return part, []
    if len(bad) == len(part.rows):
        what = f"{part.name}: not one row can be read ({next(iter(bad.values()))})"
        raise PlanError([Problem(("data", "path"), what)])
    share = f"{len(bad):,} of {len(part.rows):,} rows of {part.name} ({len(bad) / len(part.rows):.1%})"
    return without(part, sorted(bad)), [f"{share} are left out: {_said(part, bad)}"]


def _check(feature: Any) -> Callable[[Any], None] | None:
    if isinstance(feature, Image):
        return pictures.check
    return sounds.check if isinstance(feature, Audio) else None


def _undecodable(rows: Dataset, column: str, check: Callable[[Any], None]) -> dict[int, str]:
    """Row -> why it can't be decoded."""

    def reason(value: Any) -> str:
        if value is None:
            return f"`{column}` has no value"
        try:
            check(value)
        except UnreadableError as error:
            return str(error)
        return ""

    # scipy's reader has to be told which warnings are errors, and that holds for all threads at once
    threads = os.cpu_count() if check is pictures.check else 1
    reasons: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        if check is pictures.check:  # a file of kilobytes that unfolds to gigabytes
            warnings.filterwarnings("error", message="Image size .* exceeds limit")
        for batch in rows.select_columns([column]).iter(256):
            reasons += pool.map(reason, batch[column])
    return {index: reasons[index] for index in np.flatnonzero([bool(said) for said in reasons]).tolist()}


def _said(part: Slice, bad: Mapping[int, str]) -> str:
    """The first few bad rows with their numbers, and how many there are in all."""
    table = Table(part.name, {}, {}, tuple(span for _, span in part.spans))
    named = [f"{table.row(index)}: {reason}" for index, reason in list(bad.items())[:MOST_NAMED]]
    more = len(bad) - len(named)
    return "; ".join(named) + (f"; and {more:,} more" if more else "")
