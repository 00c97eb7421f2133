"""Rows that are read as they come, from the first to the last and over again: a split to train on without a length.

The examples of a stage are numbered from 0, and which one a number means follows from the seed and the stage alone, so
a run that is resumed reads up to where it was. Nothing is kept on disk, and nothing of a stream is ever held whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from engine.errors import Key, PlanError, Problem, RunError
from engine.randomness import stable_seed
from engine.recipe import Recipe
from engine.rows.origins import Origin, reading
from engine.rows.selection import VALIDATION, Slice
from engine.rows.split import Split, Strategy
from engine.tasks import Table, Task
from engine.tasks.base import Example

HEAD = 1000
"""Rows that are looked at before a run: columns, form and lengths are told by them."""
JUDGES = 500
"""Rows at the beginning that judge, where the data have no split for it."""
CHUNK = 1000
"""Rows that are encoded together; packed texts come from the same chunk."""
BUFFER = 10_000
"""Rows that wait to be drawn at random; those further apart in the stream never change places."""
KEPT = 4096
"""Examples that stay at hand: more than two steps want at once."""

Encode = Callable[[Mapping[str, Any]], Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Stream:
    """The rows to train on, none of them read yet."""

    name: str
    """How a user is told of it."""
    rows: IterableDataset
    count: int
    """Examples of the longest stage: what is an epoch where there is none."""

    def renamed(self, columns: Mapping[str, str]) -> Stream:
        """The same rows with the task's own columns alone."""
        kept = self.rows.select_columns(list(columns.values()))
        renames = {column: name for name, column in columns.items() if column != name}
        return replace(self, rows=kept.rename_columns(renames) if renames else kept)

    def chunks(self, seed: int | None) -> Iterator[dict[str, list[Any]]]:
        """All rows once, in the order that a seed says, or in their own; raises where they can't be read."""
        rows = self.rows if seed is None else self.rows.shuffle(seed=seed, buffer_size=BUFFER)
        with reading(self.name):
            yield from rows.iter(batch_size=CHUNK)


class Streamed(Split):
    """The examples of a stream, as many as its longest stage takes."""

    def __init__(self, stream: Stream, task: Task, encode: Encode, head: Dataset, by: str):
        """`head` holds the stream's first rows, and `by` says in which way rows are encoded."""
        super().__init__(head, by=by)
        self._stream, self._task, self._encode = stream, task, encode
        self._seed: int | None = None
        self._start()

    def __len__(self) -> int:
        return self._stream.count

    passing = True

    @property
    def lengths(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None

    @cached_property
    def known_lengths(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        found = self._encode(self._rows[:])
        ids = found.get("input_ids")
        return np.array([len(each) for each in ids]) if ids is not None else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the first rows and of what the stream is called; all of it is never seen at once."""
        digest = blake2b(repr((self._by, self._stream.name)).encode(), digest_size=16)
        digest.update(repr(self._rows[:]).encode())
        return digest.hexdigest()

    def order(self, strategy: Strategy, batch_size: int, seed: int, stage: str, epoch: int) -> np.ndarray:
        self._seed = None if strategy == "sequential" else stable_seed(seed, "stream", stage, epoch)
        self._start()
        return np.arange(len(self))

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        wanted = [int(index) for index in indices]
        if wanted and min(wanted) < self._reached - len(self._ready):
            self._start()
        while self._reached <= max(wanted, default=-1):
            self._ready[self._reached] = next(self._flow)
            self._reached += 1
            self._ready.pop(self._reached - 1 - KEPT, None)
        return [dict(self._ready[index]) for index in wanted]

    def _start(self) -> None:
        self._ready: dict[int, Example] = {}
        self._reached, self._flow = 0, self._flowing()

    def _flowing(self) -> Iterator[Example]:
        """Examples without end: after the last row the first comes again, in another order."""
        turn = 0
        while True:
            seen = False
            for rows in self._stream.chunks(None if self._seed is None else stable_seed(self._seed, turn)):
                self._check(rows)
                columns = self._encode(rows)
                for values in zip(*columns.values(), strict=True):
                    seen = True
                    yield dict(zip(columns, values, strict=True))
            if not seen:
                raise RunError(f"{self._stream.name} holds nothing to train on behind the rows that judge")
            turn += 1

    def _check(self, rows: Mapping[str, list[Any]]) -> None:
        """Raise `RunError` for rows that a task would have refused, had it seen them before."""
        try:
            columns = {name: pa.chunked_array([pa.array(values)]) for name, values in rows.items()}
            self._task.facts({"train": _Chunk(self._stream.name, columns, self._rows.features, ())})
        except PlanError as error:
            raise RunError(error.problems[0].sentence) from error
        except pa.ArrowException as error:
            raise RunError(f"{self._stream.name} holds rows of mixed types: {error}") from error


class _Chunk(Table):
    """Some rows of a stream: drawn at random they have no numbers, so they are known by how they begin."""

    def row(self, index: int) -> str:
        said = " ".join(str(next(iter(self.columns.values()))[index].as_py()).split())
        return f"{self.name}, the row that begins `{said[:60]}`"


def pick(recipe: Recipe, source: Origin) -> tuple[dict[str, Slice], Stream]:
    """What is looked at before a run: the rows that judge, whole, and as `train` the first rows; and the stream.

    Raises `PlanError` for splits that don't exist, and for slices that only a length could tell.
    """
    splits = recipe.data.splits
    judge = splits.validation if splits.validation is not None else _judging(splits.train, source)
    specs = {"validation": judge, "test": splits.test}
    found = {role: _first(spec, source, ("data", "splits", role)) for role, spec in specs.items() if spec is not None}
    train, most = _first(splits.train, source, ("data", "splits", "train"))
    if most is not None:
        what = f"`{splits.train}` is a part of a stream, and what trains goes on to its end"
        raise PlanError([Problem(("data", "splits", "train"), what, f"write `{train}`")])
    skipped = 0
    for role, (name, count) in found.items():
        if name == train and count is None:
            what = f"`{name}` is trained on, so only some of its first rows can be the {role} rows"
            raise PlanError([Problem(("data", "splits", role), what, f"write `{name}[:{JUDGES}]`")])
        skipped = max(skipped, (count or 0) if name == train else 0)
    rows = source.load(train).skip(skipped) if skipped else source.load(train)
    slices = {"train": _slice(source, train, rows, HEAD, skipped)}
    slices |= {role: _slice(source, name, source.load(name), count) for role, (name, count) in found.items()}
    stages = recipe.stages if isinstance(recipe.stages, tuple) else (recipe.stages,)
    steps = max(stage.steps or 0 for stage in stages)
    return slices, Stream(source.names[train], rows, recipe.batch_size * steps)


def notes(slices: Mapping[str, Slice]) -> list[str]:
    """Sentences on what was looked at, and what was not."""
    judged = f"; {len(slices['validation'].rows):,} rows of {slices['validation'].name} judge"
    seen = f"read as a stream: columns and form are told by its first {len(slices['train'].rows):,} rows"
    return [f"{slices['train'].name} is {seen}{judged}", "rows of train that judge as well are not looked for"]


def _judging(train: str, source: Origin) -> str:
    named = next((name for name in VALIDATION if name in source.names), train)
    return f"{named}[:{JUDGES}]"


def _first(spec: str | float, source: Origin, key: Key) -> tuple[str, int | None]:
    """Split and number of rows of a spec such as `validation[:500]`; None where it is the whole split."""
    form = re.fullmatch(r"([^\[\]+(]+)(?:\[:(\d+)\])?", str(spec))
    if isinstance(spec, float) or form is None or form[2] == "0":
        what = f"`{spec}` is no slice of a stream, which has no length to take a share of"
        raise PlanError([Problem(key, what, f"write `validation` or `train[:{JUDGES}]`: some of the first rows")])
    if form[1] not in source.names:
        raise PlanError([Problem(key, f"the data have no split `{form[1]}`", f"there are: {', '.join(source.names)}")])
    return form[1], int(form[2]) if form[2] else None


def _slice(source: Origin, name: str, rows: IterableDataset, count: int | None, start: int = 0) -> Slice:
    """The first rows of a stream, read now."""
    with reading(source.names[name]):
        found = list(rows if count is None else rows.take(count))
    if not found:
        more = f" behind the {start:,} rows that judge" if start else ""
        raise PlanError([Problem(("data", "path"), f"{source.names[name]} holds no rows{more}")])
    table = Dataset.from_list(found, features=rows.features)
    return Slice(source.names[name], table, ((name, range(start, start + len(found))),))
