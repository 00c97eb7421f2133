"""Which rows train and which rows judge: slices of splits, a held-out share, and rows that stand on both sides.

Chooses rows and never changes, drops or repeats one. A choice follows from the rows and the seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Dataset, Image, ReadInstruction, concatenate_datasets

from engine.errors import Key, PlanError, Problem
from engine.metrics import SINGLE
from engine.randomness import stable_seed
from engine.recipe import Splits
from engine.rows.origins import Origin
from engine.tasks.files import content

VALIDATION = ("validation", "dev", "valid", "val")
"""Names under which the split that judges is looked for. A test split is never taken unless the recipe names it."""
HELD_OUT = 0.1
"""Share of the training rows that judges where the data have no split for it."""


@dataclass(frozen=True)
class Slice:
    """Some rows of one split or of several."""

    name: str
    """How a user is told of it."""
    rows: Dataset
    spans: tuple[tuple[str, range], ...]
    """Where the rows come from: split and row numbers, in order."""


def pick(splits: Splits, source: Origin) -> dict[str, Slice]:
    """The slices that a recipe names, as `train`, `validation` and `test`; the last two where there are any.

    Raises `PlanError` for splits that don't exist, are empty, or are trained on and judged by at once.
    """
    judge = splits.validation
    if judge is None:
        judge = next((name for name in VALIDATION if name in source.names), None)
    wanted = {"train": splits.train, "validation": judge, "test": splits.test}
    named = {role: spec for role, spec in wanted.items() if isinstance(spec, str)}
    loaded: dict[str, Dataset] = {}
    found = {role: _slice(spec, source, loaded, ("data", "splits", role)) for role, spec in named.items()}
    problems = [_overlap(role, part, found["train"]) for role, part in found.items() if role != "train"]
    if said := [problem for problem in problems if problem]:
        raise PlanError(said)
    return found


def _slice(spec: str, source: Origin, loaded: dict[str, Dataset], key: Key) -> Slice:
    """The rows of a spec such as `train`, `train[:80%]` or `train[:10]+extra`."""
    names = [re.split(r"[\[(]", part)[0] for part in spec.split("+")]
    for name in names:
        if name not in source.names:
            near = get_close_matches(name, source.names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(source.names)}"
            raise PlanError([Problem(key, f"the data have no split `{name}`", hint)])
        if name not in loaded:
            loaded[name] = source.load(name)
    try:
        # datasets takes split names of letters, digits and dots only; any name a file has is one here
        aliases = {name: f"s{index}" for index, name in enumerate(dict.fromkeys(names))}
        parts = [aliases[name] + part[len(name) :] for name, part in zip(names, spec.split("+"), strict=True)]
        lengths = {alias: len(loaded[name]) for name, alias in aliases.items()}
        instructions = ReadInstruction.from_spec("+".join(parts)).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        what = f"`{spec}` is no slice of a split"
        raise PlanError([Problem(key, what, "write `train[:80%]`, `train[100:]` or the like")]) from error
    origin = {alias: name for name, alias in aliases.items()}
    spans = tuple((origin[i.splitname], range(i.from_, i.to)) for i in instructions)
    if not sum(len(span) for _, span in spans):
        raise PlanError([Problem(key, f"`{spec}` has no rows")])
    rows = [loaded[name].select(span) for name, span in spans]
    name = source.names[names[0]] if len(aliases) == 1 else f"split {spec}"
    return Slice(name, rows[0] if len(rows) == 1 else concatenate_datasets(rows), spans)


def _overlap(role: str, part: Slice, train: Slice) -> Problem | None:
    """The problem of a slice that has rows of the training slice in it."""
    shared = [
        range(max(mine.start, its.start), min(mine.stop, its.stop))
        for split, mine in part.spans
        for other, its in train.spans
        if split == other
    ]
    count = sum(map(len, shared))
    if not count:
        return None
    what = f"{count:,} rows of {train.name} are trained on and are also the {role} rows"
    return Problem(("data", "splits", role), what, "cut the slices so that they share none")


def without(part: Slice, bad: Sequence[int]) -> Slice:
    """The slice without the rows at the indices `bad`, which are in order; the others keep their row numbers."""
    kept = np.delete(np.arange(len(part.rows)), list(bad))
    numbers = [(split, number) for split, span in part.spans for number in span]
    spans: list[tuple[str, range]] = []
    for split, number in (numbers[index] for index in kept):
        if spans and spans[-1][0] == split and spans[-1][1].stop == number:
            spans[-1] = (split, range(spans[-1][1].start, number + 1))
        else:
            spans.append((split, range(number, number + 1)))
    return Slice(part.name, part.rows.select(kept), tuple(spans))


def arrow(rows: Dataset, column: str) -> pa.ChunkedArray:
    """A column of the chosen rows as Arrow holds it."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def inputs(rows: Dataset, target: str | None) -> pa.ChunkedArray | None:
    """One text per row that tells rows apart by all they are predicted from: texts, pictures, sounds; else None."""
    columns = []
    for name in rows.column_names:
        if name == target:
            continue
        values = arrow(rows, name)
        if isinstance(rows.features[name], Image | Audio):
            values = pa.chunked_array([[blake2b(content(file)).hexdigest() for file in rows[name]]])
        if pa.types.is_list(values.type) and pa.types.is_string(values.type.value_type):
            values = pc.binary_join(values, "\x1f")
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            return None
        columns.append(values.cast(pa.large_string()))
    if len(columns) < 2:
        return columns[0] if columns else None
    return pc.binary_join_element_wise(*columns, pa.scalar("\x1e", pa.large_string()))


def duplicates(train: Dataset, other: Dataset, name: str, target: str | None) -> list[str]:
    """A sentence on the rows of `other` whose inputs are in `train` as well, or none."""
    ours, theirs = inputs(train, target), inputs(other, target)
    if ours is None or theirs is None:
        return []
    count = pc.sum(pc.is_in(theirs, value_set=ours.combine_chunks())).as_py()
    if not count:
        return []
    share = f"{count:,} of {len(theirs):,} {name} rows ({count / len(theirs):.1%})"
    return [f"{share} are in train as well: on them {name} measures memory"]


def hold_out(
    rows: Dataset, target: str | None, problem: str, share: float, seed: int
) -> tuple[Dataset, Dataset | None, str]:
    """(what is left to train on, what is held out, a sentence on it).

    About `share` of the rows, of each class alike where there are classes; equal inputs stay on one side. A single
    row is not split.
    """
    texts = inputs(rows, target)
    groups = np.arange(len(rows)) if texts is None else _codes(texts)
    stratified = problem == SINGLE and target is not None
    strata = _codes(arrow(rows, target)) if stratified and target else np.zeros(len(rows), dtype=np.int64)
    mask = held_out(groups, strata, share, stable_seed(seed, "hold out"))
    if not mask.any():
        return rows, None, "there is nothing to hold out, so nothing judges"
    how = ", every label alike" if stratified else ""
    copies = ", copies of a text on one side" if len(np.unique(groups)) < len(rows) else ""
    note = f"{mask.sum():,} of {len(rows):,} training rows ({mask.mean():.1%}) are held out to judge by{how}{copies}"
    return rows.select(np.flatnonzero(~mask)), rows.select(np.flatnonzero(mask)), note


def held_out(groups: np.ndarray, strata: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which rows to hold out, as booleans (rows,).

    Draws whole groups, `share` of them rounded, from the strata in proportion (largest remainder); a stratum keeps at
    least one group to train on. A group belongs to the stratum of its first row.
    """
    names, first = np.unique(groups, return_index=True)
    kinds, sizes = np.unique(strata[first], return_counts=True)
    quota = _quotas(sizes, share)
    draws = np.random.default_rng(seed).random(len(names))
    chosen = [
        names[members[np.argsort(draws[members], kind="stable")[:count]]]
        for kind, count in zip(kinds, quota, strict=True)
        for members in [np.flatnonzero(strata[first] == kind)]
    ]
    return np.isin(groups, np.concatenate(chosen))


def _quotas(sizes: np.ndarray, share: float) -> np.ndarray:
    exact = sizes * share
    total = min(max(1, round(float(exact.sum()))), int((sizes - 1).sum()))
    quota = np.minimum(np.floor(exact).astype(int), sizes - 1)
    while quota.sum() < total:
        room = np.where(quota < sizes - 1, exact - quota, -np.inf)
        quota[int(np.argmax(room))] += 1
    return quota


def _codes(values: Sequence | pa.ChunkedArray) -> np.ndarray:
    """A number for each value, equal for equal ones (rows,)."""
    return values.combine_chunks().dictionary_encode().indices.to_numpy()
