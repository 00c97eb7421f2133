"""Rows for a run: read, checked and split; encoded once; put into an order that follows from the seed alone.

Reads what a recipe names and nothing else, and changes no row: columns are renamed, rows are chosen. It knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from engine.errors import Key, PlanError, Problem
from engine.forecast import Sizes
from engine.media import sift
from engine.metrics import unserved
from engine.origins import find, quietly
from engine.randomness import stable_seed
from engine.recipe import Recipe
from engine.selection import HELD_OUT, Slice, arrow, duplicates, hold_out, pick
from engine.tasks import Facts, Table, Task
from engine.tasks.base import TRUNCATED, Example

Strategy = Literal["random", "sequential", "group_by_length"]
KEPT = 1 << 30
"""Bytes of examples that a split keeps in memory where they are made as they are read: 1,700 pictures of 224 x 224.

On disk they would take twenty times the room of their files, so they are never written there; decoding them again costs
as much as a small model's forward pass, so as many as fit are not decoded twice."""


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


class Split:
    """Rows as the model takes them, unpadded."""

    def __init__(
        self,
        rows: Dataset,
        prepare: Callable[[Any], Mapping[str, list[Any]]] | None = None,
        by: str = "",
        members: int = 1,
    ):
        """`prepare` turns raw columns into the model's inputs as they are read; `by` says which way it does so.

        `members` rows in a row are one example, and come one after the other.
        """
        self._rows = rows
        self._prepare = prepare
        self._by = by
        self.members = members
        self._kept: dict[int, Example] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self._rows) // self.members

    @cached_property
    def single(self) -> Split:
        """The same rows, each an example by itself."""
        return self if self.members == 1 else Split(self._rows, self._prepare, self._by)

    def with_column(self, name: str, values: Sequence[Any]) -> Split:
        """The same rows with one more column, which follows from them and so leaves their fingerprint as it is."""
        split = Split(self._rows.add_column(name, list(values)), self._prepare, self._by, self.members)
        split.fingerprint = self.fingerprint
        split.single.fingerprint = self.single.fingerprint
        return split

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """The rows of which the examples at `indices` are made; these are the examples of `single`."""
        firsts = np.asarray(indices, dtype=np.int64)[:, None] * self.members
        return (firsts + np.arange(self.members)).ravel().tolist()

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """The examples at `indices`, labels included, ready for the task's collate function."""
        rows = self.rows(indices)
        if self._prepare is None:
            return self._made(rows)
        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        made = dict(zip(missing, self._made(missing) if missing else [], strict=True))
        for row, example in made.items():
            self._keep(row, example)
        return [dict(made.get(row) or self._kept[row]) for row in rows]

    def _made(self, rows: Sequence[int]) -> list[Example]:
        columns = self._rows[list(rows)]
        columns = self._prepare(columns) if self._prepare else columns
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _keep(self, row: int, example: Example) -> None:
        """Keep what was made of a row, while there is room; what is kept stays, for every epoch wants all of them."""
        size = sum(_size(value) for value in example.values())
        if size <= self._room:
            self._room -= size
            self._kept[row] = example

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each example's longest row (examples,), or None where examples have no tokens."""
        if "input_ids" not in self._rows.column_names:
            return None
        lengths = pc.list_value_length(arrow(self._rows, "input_ids")).to_numpy().astype(np.int64)
        return lengths.reshape(-1, self.members).max(axis=1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the rows' content, whatever file or cache they came from."""
        digest = blake2b(self._by.encode(), digest_size=16)
        for name in sorted(self._rows.column_names):
            digest.update(f"{name}:{self._rows.features[name]}".encode())
        for batch in self._rows.with_format("arrow").iter(1000):
            for name in sorted(batch.column_names):
                _digest(digest, batch.column(name).combine_chunks())
        return digest.hexdigest()


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
    source = find(recipe.data, root)
    slices = pick(splits, source)
    columns = _columns(task, recipe.data.columns, slices)
    notes = _choices(columns, slices, source.names)
    for role, part in slices.items():
        slices[role], left_out = sift(part, columns, recipe.data.on_bad_rows)
        notes += left_out
    rows = {role: _renamed(part.rows, columns) for role, part in slices.items()}
    facts = task.facts({role: _table(part, rows[role]) for role, part in slices.items()})
    _check_metrics(recipe, facts)
    notes += facts.notes
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
    train = split("train", rows.train)
    assert train is not None
    return Encoded(train, split("validation", rows.validation), split("test", rows.test), tuple(notes))


def sizes(train: Split, validation: Split | None) -> Sizes:
    """How many rows go through the model in an epoch and how long they are, for a forecast of what that costs."""
    lengths = train.single.lengths
    counts = len(train.single), len(validation.single) if validation is not None else 0
    if lengths is None or not len(lengths):
        return Sizes(*counts)
    return Sizes(*counts, float(lengths.mean()), float((lengths.astype(float) ** 2).mean()), int(lengths.max()))


def order(
    split_len: int, lengths: np.ndarray | None, strategy: Strategy, batch_size: int, seed: int, stage: str, epoch: int
) -> np.ndarray:
    """The order of the examples in one epoch, as indices (examples,): a pure function of its arguments.

    Every example comes once and none is dropped; only the last batch may be smaller. Grouped by length, a batch holds
    examples of similar length, and the batch with the longest comes first, so that memory runs out at once or never.
    """
    if strategy == "sequential":
        return np.arange(split_len)
    generator = torch.Generator().manual_seed(stable_seed(seed, "order", stage, epoch))
    if strategy == "random" or lengths is None:
        return torch.randperm(split_len, generator=generator).numpy()
    from transformers.trainer_pt_utils import get_length_grouped_indices

    grouped = np.array(get_length_grouped_indices(lengths.tolist(), batch_size, generator=generator), dtype=np.int64)
    full = split_len // batch_size
    if full < 2:
        return grouped
    # They come sorted within a window of 50 batches, long ones first: a rate that falls would favour the long ones.
    shuffled = 1 + torch.randperm(full - 1, generator=generator).numpy()
    batches = grouped[: full * batch_size].reshape(full, batch_size)
    return np.concatenate([batches[0], batches[shuffled].ravel(), grouped[full * batch_size :]])


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


def _digest(digest: blake2b, values: pa.Array) -> None:
    """Add an array's values to a hash: numbers as their bytes, lists as lengths and items, all else as text."""
    if isinstance(values, pa.ListArray | pa.LargeListArray) and not values.null_count:
        digest.update(pc.list_value_length(values).cast(pa.int64()).to_numpy().tobytes())
        _digest(digest, values.flatten())
    elif (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)) and not values.null_count:
        digest.update(values.to_numpy().tobytes())
    else:
        digest.update(repr([_loaded(value) for value in values.to_pylist()]).encode())


def _size(value: Any) -> int:
    """About how many bytes an array or a picture takes in memory."""
    if hasattr(value, "nbytes"):
        return value.nbytes
    return value.width * value.height * 3 if hasattr(value, "width") else 64


def _loaded(value: Any) -> Any:
    """An image or a recording that is kept as the path of its file, with the file's bytes."""
    if isinstance(value, dict) and value.get("path") and "bytes" in value and value["bytes"] is None:
        return {"bytes": Path(value["path"]).read_bytes()}
    return {"bytes": value["bytes"]} if isinstance(value, dict) and set(value) == {"bytes", "path"} else value
