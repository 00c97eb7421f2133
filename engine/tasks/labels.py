"""What a label column says (kind of problem, names, how they are written), and labels as a loss wants them.

Reads label columns only. It never drops a row and never guesses past a contradiction: that is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import PlanError, Problem
from engine.metrics import MULTI, REGRESSION, SINGLE
from engine.tasks.base import Facts, Table
from engine.tasks.columns import bad_items, bad_rows, missing, stop_at, wrong_kind

if TYPE_CHECKING:
    import pyarrow as pa

LABEL = "label"
IGNORED = -100
"""PyTorch's `ignore_index`: a row with this label teaches nothing."""


def learn(tables: Mapping[str, Table], asked: str | None = None) -> Facts:
    """What the column `label` of the training rows says; the other splits are checked against it.

    `asked` is Hugging Face's `problem_type` where the recipe names one; otherwise the column's own type decides.
    Raises `PlanError`.
    """
    stop_at(wrong_kind(table, LABEL) or missing(table, LABEL) for table in tables.values())
    found = _kind(tables["train"])
    facts = {SINGLE: _classes, MULTI: _sets, REGRESSION: _numbers}[asked or found](tables)
    if asked:
        return facts
    held = {SINGLE: "one class a row", MULTI: "lists", REGRESSION: "floating-point numbers"}[found]
    note = f"problem_type is {found}, because `{LABEL}` holds {held}"
    return Facts(facts.labels, facts.problem, facts.form, facts.settings, (note, *facts.notes))


def encode(values: Sequence[Any], facts: Facts) -> list[Any]:
    """Labels as the loss wants them: an id, a 0/1 vector of floats (labels,), or a float, one for each value."""
    if facts.problem == REGRESSION:
        return [float(value) for value in values]
    ids = {name: index for index, name in enumerate(facts.labels)}
    if facts.problem == SINGLE:
        return [int(value) if facts.form == "ids" else ids[written(value)] for value in values]
    if facts.form == "vectors":
        return [[float(flag) for flag in value] for value in values]
    chosen = [{item if facts.form == "ids" else ids[written(item)] for item in value} for value in values]
    return [[float(index in row) for index in range(len(ids))] for row in chosen]


def written(value: Any) -> str:
    """A raw label as a name: whole floats, which CSV makes of integers, are integers; booleans are False and True."""
    return str(int(value)) if isinstance(value, float) else str(value)


def _kind(table: Table) -> str:
    import pyarrow as pa

    if pa.types.is_floating(table.columns[LABEL].type):
        return REGRESSION
    return MULTI if _is_list(table.columns[LABEL].type) else SINGLE


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _contradiction(problem: str, table: Table, holds: str) -> PlanError:
    other = {SINGLE: "one class", MULTI: "a list of labels", REGRESSION: "a number"}[problem]
    what = f"{problem} needs {other} in every row, but `{LABEL}` of {table.name} holds {holds}"
    return PlanError([Problem(("task", "problem_type"), what, "change the one or the other")])


def _classes(tables: Mapping[str, Table]) -> Facts:
    """One class a row: written as text, booleans, integers, or ids of a `ClassLabel`."""
    import pyarrow.compute as pc

    train = tables["train"]
    values = {split: _names(table, SINGLE) for split, table in tables.items()}
    if declared := getattr(train.features[LABEL], "names", None):
        stop_at(_out_of_range(tables[split], names, declared) for split, names in values.items())
        labels, form = tuple(declared), "ids"
        known, called = pc.unique(values["train"]).to_pylist(), labels
    else:
        labels, form = _discover(pc.unique(values["train"]).to_pylist(), train)
        known, called = [str(index) for index in range(len(labels))] if form == "ids" else labels, ()
    stop_at(_unseen(tables[split], names, known, called) for split, names in values.items())
    counts = Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(values["train"]).to_pylist()})
    if len(counts) < 2:
        name = labels[int(next(iter(counts)))] if form == "ids" else next(iter(counts))
        what = f"{train.name}: every row has the label `{_short(name)}`, so there is nothing to tell apart"
        raise PlanError([Problem(("data", "columns", LABEL), what, "take rows of another class in")])
    named = Counter({labels[int(key)] if form == "ids" else key: count for key, count in counts.items()})
    return Facts(labels, SINGLE, form, {"num_labels": len(labels)}, (_balance(named, labels),))


def _names(table: Table, problem: str) -> pa.ChunkedArray:
    """The labels as text: integers in decimals, booleans as False and True."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.columns[LABEL]
    if _is_list(values.type):
        raise _contradiction(problem, table, "lists")
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "True", "False")
    if pa.types.is_floating(values.type):
        broken = pc.or_(pc.not_equal(pc.floor(values), values), pc.is_inf(values))
        stop_at([bad_rows(table, LABEL, broken, f"`{LABEL}` is no class but a fraction", _CLASSES_OR_NUMBERS)])
        values = values.cast(pa.int64())
    if pa.types.is_integer(values.type):
        ignored = pc.equal(values, IGNORED)
        if pc.all(ignored).as_py():
            what = f"{table.name}: every label is {IGNORED}, which the loss ignores"
            raise PlanError([Problem(("data", "columns", LABEL), what, "name the column that holds the labels")])
        stop_at([bad_rows(table, LABEL, ignored, f"`{LABEL}` is {IGNORED}, which the loss ignores", "leave it out")])
    elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise _contradiction(problem, table, f"{values.type} values")
    return values.cast(pa.string())


_CLASSES_OR_NUMBERS = "write classes as text or integers, or say `problem_type: regression`"


def _discover(names: Sequence[str], train: Table) -> tuple[tuple[str, ...], str]:
    """The labels of the training rows, sorted, and how they are written; integers from 0 on are ids by themselves."""
    import pyarrow as pa

    kind = train.columns[LABEL].type
    whole = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if whole and sorted(map(int, names)) == list(range(len(names))):
        return tuple(f"LABEL_{index}" for index in range(len(names))), "ids"
    return tuple(sorted(names, key=int) if whole else sorted(names)), "names"


def _out_of_range(table: Table, names: pa.ChunkedArray, declared: Sequence[str]) -> Problem | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = table.columns[LABEL].type
    if getattr(table.features[LABEL], "names", None) not in (None, declared):
        return Problem(("data", "columns", LABEL), f"{table.name}: its classes are not those of train, or not in order")
    if not pa.types.is_integer(kind):
        return Problem(("data", "columns", LABEL), f"{table.name}: `{LABEL}` holds {kind} values, not ids as in train")
    beyond = pc.invert(pc.is_in(names, value_set=pa.array([str(index) for index in range(len(declared))])))
    what = f"`{LABEL}` is {_first(names, beyond)}, but there are {len(declared)} classes, 0 to {len(declared) - 1}"
    return bad_rows(table, LABEL, beyond, what, "-1 often stands for a label that is kept secret: take another split")


def _unseen(table: Table, names: pa.ChunkedArray, known: Sequence[str], called: Sequence[str] = ()) -> Problem | None:
    """The problem of the first row whose label no training row has; `called` are the names of declared ids."""
    import pyarrow as pa
    import pyarrow.compute as pc

    unseen = pc.invert(pc.is_in(names, value_set=pa.array(known, names.type)))
    first = _first(names, unseen)
    what = f"the label `{called[int(first)] if called and first else first}` is in no training row"
    return bad_rows(table, LABEL, unseen, what, "add training rows of it or leave the row out")


def _first(values: pa.ChunkedArray, mask: pa.ChunkedArray) -> Any:
    import pyarrow.compute as pc

    index = pc.index(mask, True).as_py()
    return _short(values[index].as_py()) if index >= 0 else None


def _short(value: Any) -> str:
    """A value in a sentence: whole texts turn up as labels where a column is mistaken for another."""
    said = f"{value}"
    return said if len(said) <= 60 else said[:59] + "…"


def _balance(counts: Counter[str], labels: Sequence[str]) -> str:
    """One sentence on how the training rows spread over the labels."""
    total = counts.total()
    most, least = max(labels, key=lambda name: counts[name]), min(labels, key=lambda name: counts[name])
    common = f"`{_short(most)}` is the commonest with {counts[most] / total:.1%} of them"
    told = f"{len(labels):,} labels in train: {common}, "
    if absent := [_short(name) for name in labels if not counts[name]]:
        more = f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
        return f"{told}no row has {', '.join(f'`{name}`' for name in absent[:3])}{more}, so none can be learnt"
    return f"{told}`{_short(least)}` the rarest with {counts[least] / total:.1%}"


def _numbers(tables: Mapping[str, Table]) -> Facts:
    """A number a row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for table in tables.values():
        values = table.columns[LABEL]
        if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
            raise _contradiction(REGRESSION, table, "lists" if _is_list(values.type) else f"{values.type} values")
        infinite = pc.is_inf(values.cast(pa.float64()))
        stop_at([bad_rows(table, LABEL, infinite, f"`{LABEL}` is infinite", "leave the row out")])
    train = tables["train"]
    low, high = (float(bound) for bound in pc.min_max(train.columns[LABEL]).as_py().values())
    if low == high:
        what = f"{train.name}: every row has the label {low:g}, so there is nothing to learn"
        raise PlanError([Problem(("data", "columns", LABEL), what)])
    mean = float(pc.mean(train.columns[LABEL]).as_py())
    note = f"`{LABEL}` of train lies between {low:g} and {high:g}, {mean:.4g} on average"
    return Facts((), REGRESSION, "numbers", {"num_labels": 1}, (note,))


def _sets(tables: Mapping[str, Table]) -> Facts:
    """Several labels a row: a list of names, a list of ids, or a vector of 0 and 1."""
    import pyarrow as pa
    import pyarrow.compute as pc

    train = tables["train"]
    items = {split: _items(table) for split, table in tables.items()}
    declared = getattr(getattr(train.features[LABEL], "feature", None), "names", None)
    if not declared and (width := _vector_width(tables, items)):
        return _vectors(train, items["train"], width)
    if pa.types.is_floating(items["train"].type):
        raise _contradiction(MULTI, train, "lists of numbers that are not vectors of 0 and 1")
    names = {split: values.cast(pa.string()) for split, values in items.items()}
    labels, form = declared_or_found(declared, pc.unique(names["train"]).to_pylist(), items["train"].type)
    known = [str(index) for index in range(len(labels))] if form == "ids" else labels
    stop_at(_unseen_items(tables[split], values, known) for split, values in names.items())
    found = names["train"].to_pylist()
    counts = Counter(labels[int(name)] for name in found) if form == "ids" else Counter(found)
    notes = (f"{len(found) / len(train.columns[LABEL]):.2f} labels a row in train", _balance(counts, labels))
    return Facts(labels, MULTI, form, {"num_labels": len(labels)}, notes)


def _items(table: Table) -> pa.ChunkedArray:
    """All labels of all rows, one after the other."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = table.columns[LABEL]
    if not _is_list(lists.type):
        raise _contradiction(MULTI, table, f"{lists.type} values, not lists")
    items = pc.list_flatten(lists)
    gaps = pc.is_null(items, nan_is_null=True)
    stop_at([_bad_items(table, gaps, f"a label in `{LABEL}` has no value", "leave it out of the list")])
    if not len(items) or pa.types.is_null(items.type):
        what = f"{table.name}: no row has a label"
        raise PlanError([Problem(("data", "columns", LABEL), what, "name the column that holds the labels")])
    return items


def _bad_items(table: Table, mask: pa.ChunkedArray, what: str, advice: str) -> Problem | None:
    return bad_items(table, LABEL, mask, what, advice)


def _vector_width(tables: Mapping[str, Table], items: Mapping[str, pa.ChunkedArray]) -> int:
    """How many 0/1 flags every training row has, or 0 where the rows aren't such vectors.

    Two rows of one length that hold only 0 and 1 could be ids as well; but ids of one row differ, and flags of more
    than two labels can't.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = items["train"]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return 0
    sizes = pc.unique(pc.list_value_length(tables["train"].columns[LABEL])).to_pylist()
    flags = pc.all(pc.is_in(values.cast(pa.float64()), value_set=pa.array([0.0, 1.0]))).as_py()
    if not flags or len(sizes) != 1 or sizes[0] < 2:
        return 0
    stop_at(_not_vectors(table, items[split], sizes[0]) for split, table in tables.items())
    return sizes[0]


def _not_vectors(table: Table, items: pa.ChunkedArray, width: int) -> Problem | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(items.type) or pa.types.is_large_string(items.type):
        return Problem(("data", "columns", LABEL), f"{table.name}: `{LABEL}` holds names, but vectors in train")
    advice = "give every row one flag for each label"
    length = pc.not_equal(pc.list_value_length(table.columns[LABEL]), width)
    if problem := bad_rows(table, LABEL, length, f"`{LABEL}` isn't a vector of {width} flags as in train", advice):
        return problem
    other = pc.invert(pc.is_in(items.cast(pa.float64()), value_set=pa.array([0.0, 1.0])))
    return _bad_items(table, other, f"`{LABEL}` holds {_first(items, other)}, neither 0 nor 1", advice)


def _vectors(train: Table, items: pa.ChunkedArray, width: int) -> Facts:
    import numpy as np
    import pyarrow as pa

    flags = items.cast(pa.float64()).to_numpy().reshape(-1, width)
    labels = tuple(f"LABEL_{index}" for index in range(width))
    if not flags.any():
        raise PlanError([Problem(("data", "columns", LABEL), f"{train.name}: no row has a label")])
    counts = Counter({name: int(count) for name, count in zip(labels, np.sum(flags, axis=0), strict=True)})
    notes = (f"{flags.sum() / len(flags):.2f} labels a row in train", _balance(counts, labels))
    return Facts(labels, MULTI, "vectors", {"num_labels": width}, notes)


def declared_or_found(declared: Any, names: Sequence[str], kind: pa.DataType) -> tuple[tuple[str, ...], str]:
    """The labels in the order of their ids, and how they are written: as a `ClassLabel` declares them, or as found."""
    import pyarrow as pa

    if declared:
        return tuple(declared), "ids"
    if not pa.types.is_integer(kind):
        return tuple(sorted(names)), "names"
    ids = sorted(map(int, names))
    if ids == list(range(len(ids))):
        return tuple(f"LABEL_{index}" for index in ids), "ids"
    return tuple(map(str, ids)), "names"


def _unseen_items(table: Table, names: pa.ChunkedArray, known: Sequence[str]) -> Problem | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    unseen = pc.invert(pc.is_in(names, value_set=pa.array(known, names.type)))
    what = f"the label `{_first(names, unseen)}` is in no training row"
    return _bad_items(table, unseen, what, "add training rows of it or leave it out")
