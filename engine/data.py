"""Rows for a run: read, checked and split; encoded once where they are small enough to be kept.

Reads what a recipe names and nothing else, and changes no row: columns are renamed, rows are chosen. It knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from engine.errors import Key, PlanError, Problem
from engine.metrics import unserved
from engine.planning.forecast import Sizes
from engine.recipe import Recipe
from engine.rows import streaming
from engine.rows.media import sift
from engine.rows.origins import find, quietly
from engine.rows.selection import HELD_OUT, Slice, arrow, duplicates, hold_out, pick
from engine.rows.split import KEPT, Split, order
from engine.tasks import Facts, Table, Task
from engine.tasks.base import TRUNCATED

__all__ = ["Encoded", "Rows", "Split", "encode", "order", "read", "sizes"]


@dataclass(frozen=True)
class Rows:
    """What a recipe reads, by the task's own column names and without any other column."""

    train: Dataset
    validation: Dataset | None
    """None only where a single row was left to train on and nothing to judge by."""
    test: Dataset | None
    facts: Facts
    notes: tuple[str, ...]
    """Sentences worth printing."""
    stream: streaming.Stream | None = None
    """What trains where it is read as it comes; `train` then holds its first rows."""

    @property
    def count(self) -> int:
        """Rows to train on."""
        return self.stream.count if self.stream else len(self.train)


@dataclass(frozen=True)
class Encoded:
    """The splits of a run, encoded."""

    train: Split
    validation: Split | None
    test: Split | None
    notes: tuple[str, ...]
    """Sentences worth printing."""


def read(recipe: Recipe, root: Path) -> Rows:
    """Read, check and split the data of a recipe; local files lie below `root`.

    Raises `PlanError` for what a recipe or its rows have wrong, `RunError` where data can't be reached.
    """
    task, splits = recipe.task, recipe.data.splits
    if recipe.data.streaming and not task.streams:
        what = f"{task.type} learns from all rows what there is to predict, so it can't begin before it has them"  # pyright: ignore
        raise PlanError([Problem(("data", "streaming"), what, "leave the key out")])
    source = find(recipe.data, root)
    slices, stream = streaming.pick(recipe, source) if recipe.data.streaming else (pick(splits, source), None)
    columns = _columns(task, recipe.data.columns, slices)
    notes = _choices(columns, slices, source.names)
    for role, part in slices.items():
        slices[role], left_out = sift(part, columns, recipe.data.on_bad_rows)
        notes += left_out
    rows = {role: _renamed(part.rows, columns) for role, part in slices.items()}
    facts = task.facts({role: _table(part, rows[role]) for role, part in slices.items()})
    _check_metrics(recipe, facts)
    notes += facts.notes
    if stream:
        notes += streaming.notes(slices)
        return Rows(rows["train"], rows["validation"], rows.get("test"), facts, tuple(notes), stream.renamed(columns))
    notes += [
        note for role in rows if role != "train" for note in duplicates(rows["train"], rows[role], role, task.target)
    ]
    train, validation = rows["train"], rows.get("validation")
    if validation is None:
        share = splits.validation if isinstance(splits.validation, float) else HELD_OUT
        train, validation, note = hold_out(train, task.target, facts.problem, share, recipe.seed)
        notes.append(note)
    return Rows(train, validation, rows.get("test"), facts, tuple(notes))


def encode(rows: Rows, task: Task, processor: Any) -> Encoded:
    """Encode every split: once and for all where the task is of that kind, else as examples are read."""
    notes: list[str] = []

    def split(name: str, dataset: Dataset | None) -> Split | None:
        if dataset is None:
            return None
        if not task.encoded_once:
            prepare = lambda batch: _inputs(task, batch, processor, rows.facts)  # noqa: E731
            by = repr((task.model_dump_json(), rows.facts, _identity(processor)))
            return Split(dataset, prepare, by, rows.facts.members)
        encoded = _encode(dataset, task, processor, rows.facts)
        if TRUNCATED in encoded.column_names and (lost := pc.sum(arrow(encoded, TRUNCATED)).as_py()):
            share = f"{lost:,} of {len(encoded):,} {name} rows ({lost / len(encoded):.1%})"
            notes.append(f"{share} are longer than the limit and lose their end")
        kept = encoded.remove_columns([name for name in (TRUNCATED,) if name in encoded.column_names])
        return Split(kept, members=rows.facts.members)

    splits = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    task.fit({name: dataset for name, dataset in splits.items() if dataset is not None}, processor)
    if rows.stream:
        by = repr((task.model_dump_json(), rows.facts, _identity(processor)))
        encode = lambda columns: _inputs(task, columns, processor, rows.facts)  # noqa: E731
        train = streaming.Streamed(rows.stream, task, encode, rows.train, by)
    else:
        train = split("train", rows.train)
    assert train is not None
    return Encoded(train, split("validation", rows.validation), split("test", rows.test), tuple(notes))


def sizes(train: Split, validation: Split | None) -> Sizes:
    """How many rows go through the model in an epoch and how long they are, for a forecast of what that costs."""
    lengths = train.known_lengths
    counts = len(train.single), len(validation.single) if validation is not None else 0
    if lengths is None or not len(lengths):
        return Sizes(*counts, example=train.example, room=KEPT)
    return Sizes(*counts, float(lengths.mean()), float((lengths.astype(float) ** 2).mean()), int(lengths.max()))


def _columns(task: Task, named: Mapping[str, str], slices: Mapping[str, Slice]) -> dict[str, str]:
    """The task's column names -> those of the data. Raises `PlanError` with all that is wrong at once."""
    there = slices["train"].rows.column_names
    problems = [_misnamed(name, task.columns) for name in named if name not in task.columns]
    found = {name: column for name, column in named.items() if name in task.columns}
    for name, accepted in task.columns.items():
        free = [column for column in accepted if column in there and column not in found.values()]
        if name not in found and free:
            found[name] = free[0]
        elif name not in found and name not in task.optional:
            problems.append(_no_column(name, accepted, there))
    for name, column in found.items():
        problems += [_absent(name, column, part) for part in slices.values() if column not in part.rows.column_names]
        if sharing := [other for other in found if other < name and found[other] == column]:
            problems.append(Problem(("data", "columns", name), f"`{column}` can't be `{sharing[0]}` and `{name}` both"))
    if problems:
        raise PlanError(problems)
    return {name: found[name] for name in task.columns if name in found}


def _misnamed(name: str, known: Mapping[str, Any]) -> Problem:
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(known)}"
    return Problem(("data", "columns", name), f"the task has no column `{name}`", hint)


def _no_column(name: str, accepted: Sequence[str], there: Sequence[str]) -> Problem:
    near = [close for column in accepted for close in get_close_matches(column, there, n=1)]
    hint = f"write `columns: {{{name}: {near[0] if near else there[0]}}}` or the like"
    return Problem(("data", "columns", name), f"no column looks like `{name}` among {', '.join(there)}", hint)


def _absent(name: str, column: str, part: Slice) -> Problem:
    near = get_close_matches(column, part.rows.column_names, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(part.rows.column_names)}"
    return Problem(("data", "columns", name), f"{part.name} has no column `{column}`", hint)


def _choices(columns: Mapping[str, str], slices: Mapping[str, Slice], splits: Iterable[str]) -> list[str]:
    """Sentences on what was taken without being asked for, and what was left aside."""
    renamed = [f"`{name}` is read from `{column}`" for name, column in columns.items() if name != column]
    rest = [column for column in slices["train"].rows.column_names if column not in columns.values()]
    used = {split for part in slices.values() for split, _ in part.spans}
    unused = [split for split in splits if split not in used]
    notes = [", ".join(renamed)] if renamed else []
    notes += [f"columns left aside: {', '.join(rest)}"] if rest else []
    notes += [f"splits left aside: {', '.join(unused)}"] if unused else []
    if "validation" in slices and "test" in {split for split, _ in slices["validation"].spans}:
        notes.append("the test split chooses what is best here, so it can't measure the result any more")
    return notes


def _renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    kept = rows.select_columns(list(columns.values()))
    return kept.rename_columns({column: name for name, column in columns.items() if column != name})


def _table(part: Slice, rows: Dataset) -> Table:
    columns = {name: arrow(rows, name) for name in rows.column_names}
    return Table(part.name, columns, rows.features, tuple(span for _, span in part.spans))


def _check_metrics(recipe: Recipe, facts: Facts) -> None:
    """Every metric that the recipe names must serve the task and these labels."""
    named: list[tuple[Key, str | None]] = [(("evaluation", "metric"), recipe.evaluation.metric)]
    named += [(("evaluation", "metrics", index), name) for index, name in enumerate(recipe.evaluation.metrics)]
    for index, stage in enumerate(recipe.stages if isinstance(recipe.stages, tuple) else ()):
        if stage.early_stopping:
            named.append((("stages", index, "early_stopping", "metric"), stage.early_stopping.metric))
    known = recipe.task.known_metrics(facts)
    wrong = [(key, unserved(name, known)) for key, name in named if name]
    if problems := [Problem(key, *said) for key, said in wrong if said]:
        raise PlanError(problems)


def _encode(rows: Dataset, task: Task, processor: Any, facts: Facts) -> Dataset:
    """All rows encoded, from the cache of `datasets` where equal rows were encoded in the same way before."""
    words = (rows._fingerprint, task.model_dump_json(), facts, _identity(processor), _code())
    with quietly():
        return rows.map(
            lambda batch: task.encode(batch, processor, facts),
            batched=True,
            remove_columns=rows.column_names,
            new_fingerprint=blake2b(repr(words).encode(), digest_size=16).hexdigest(),
        )


def _inputs(task: Task, batch: Mapping[str, list[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
    return {name: values for name, values in task.encode(batch, processor, facts).items() if name != TRUNCATED}


def _identity(processor: Any) -> str:
    """All of a processor that decides what it makes of a row; not what its last call has left set in it."""
    tokenizer, said = getattr(processor, "tokenizer", processor), []
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        state = json.loads(backend.to_str())
        said += [{key: value for key, value in state.items() if key not in ("truncation", "padding")}]
        said += [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side]
        said += [str(tokenizer.special_tokens_map), tokenizer.chat_template]
    elif hasattr(tokenizer, "get_vocab"):
        said += [sorted(tokenizer.get_vocab().items())]
    said += [processor.to_json_string()] if hasattr(processor, "to_json_string") else []
    return blake2b(repr((type(processor).__name__, said)).encode(), digest_size=16).hexdigest()


def _code() -> str:
    """Hash of the code that encodes: a changed task or library must not be given what an older one made."""
    files = sorted((Path(__file__).parent / "tasks").glob("*.py"))
    versions = [version(name) for name in ("transformers", "tokenizers", "datasets")]
    return blake2b(repr((versions, [file.read_bytes() for file in files])).encode(), digest_size=16).hexdigest()
