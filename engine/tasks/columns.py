"""Checks of whole columns: every row is looked at, and the first bad one is named. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine.errors import PlanError, Problem
from engine.tasks.base import Table

if TYPE_CHECKING:
    import pyarrow


def stop_at(problems: Iterable[Problem | None]) -> None:
    """Raise all problems there are, at once."""
    if found := [problem for problem in problems if problem]:
        raise PlanError(found)


def bad_rows(table: Table, column: str, mask: pyarrow.ChunkedArray, what: str, advice: str = "") -> Problem | None:
    """The problem of the rows where `mask` is true, or None where it never is; `what` is said of the first."""
    import pyarrow.compute as pc

    if (first := pc.index(mask, True).as_py()) < 0:
        return None
    count = pc.sum(mask).as_py()
    more = f" ({count:,} rows in all)" if count > 1 else ""
    return Problem(("data", "columns", column), f"{table.row(first)}: {what}{more}", advice)


def bad_items(table: Table, column: str, mask: pyarrow.ChunkedArray, what: str, advice: str = "") -> Problem | None:
    """`bad_rows` for a mask over the items of a column of lists."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = table.columns[column].combine_chunks()  # parents are counted per chunk
    rows = np.zeros(len(lists), dtype=bool)
    rows[pc.list_parent_indices(lists).to_numpy()[mask.to_numpy()]] = True
    return bad_rows(table, column, pa.chunked_array([rows]), what, advice)


def not_lists(table: Table, column: str, of: str = "") -> Problem | None:
    """The problem of a column that isn't a list in every row; of text, where `of` calls its items so."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if problem := wrong_kind(table, column, list, "a list") or missing(table, column):
        return problem
    lists = table.columns[column]
    kind = lists.type
    text = pa.types.is_list(kind) and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))
    if not pa.types.is_list(kind) or (of and not text):
        wanted = f"lists of {of}" if of else "lists"
        return Problem(("data", "columns", column), f"{table.name}: `{column}` holds {kind} values, not {wanted}")
    empty = pc.equal(pc.list_value_length(lists), 0)
    if problem := bad_rows(table, column, empty, f"`{column}` is empty", "fill it in or leave the row out"):
        return problem
    gaps = pc.is_null(pc.list_flatten(lists), nan_is_null=True)
    return bad_items(table, column, gaps, f"an item of `{column}` has no value", "fill it in or leave the row out")


def missing(table: Table, column: str) -> Problem | None:
    """The problem of a column that lacks a value somewhere: null, None or NaN."""
    import pyarrow.compute as pc

    mask = pc.is_null(table.columns[column], nan_is_null=True)
    return bad_rows(table, column, mask, f"`{column}` has no value", "fill it in or leave the row out")


def not_text(table: Table, column: str) -> Problem | None:
    """The problem of a column that isn't text throughout, or lacks a text somewhere."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.columns[column]
    if mixed := wrong_kind(table, column, str, "text"):
        return mixed
    if problem := missing(table, column):
        return problem
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return Problem(("data", "columns", column), f"{table.name}: `{column}` holds {values.type} values, not text")
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0)
    return bad_rows(table, column, blank, f"`{column}` is empty", "fill it in or leave the row out")


def wrong_kind(table: Table, column: str, kind: type | None = None, said: str = "") -> Problem | None:
    """The problem of a column whose rows differ in type, which `datasets` keeps as JSON; the first odd row is named.

    Rows are odd that aren't of `kind`, which the sentence calls `said`; without one, of the first row's own type.
    """
    import json

    import pyarrow as pa

    values = table.columns[column]
    if not isinstance(values.type, pa.JsonType):
        return None
    for index, raw in enumerate(values):
        value = None if raw.as_py() is None else json.loads(raw.as_py())
        kind, said = kind or type(value), said or f"{type(value).__name__} as above"
        if value is not None and type(value) is not kind:
            what = f"`{column}` is {json.dumps(value)[:60]}, not {said}"
            return Problem(("data", "columns", column), f"{table.row(index)}: {what}", "give all rows one type")
    return Problem(("data", "columns", column), f"{table.name}: `{column}` holds values of mixed types")
