"""Rows as a model takes them, read by number; and the order of an epoch, which follows from the seed alone.

Keeps what fits in memory where examples are made as they are read, and never changes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from engine.randomness import stable_seed
from engine.rows.selection import arrow
from engine.tasks.base import Example

Strategy = Literal["random", "sequential", "group_by_length"]
KEPT = 1 << 30
"""Bytes of examples that a split keeps in memory where they are made as they are read: 1,700 pictures of 224 x 224.

On disk they would take twenty times the room of their files, so they are never written there; decoding them again costs
as much as a small model's forward pass, so as many as fit are not decoded twice."""


class Split:
    """Rows as the model takes them, unpadded."""

    passing = False
    """Whether examples pass by once, so that nothing about them is worth keeping."""

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

    def order(self, strategy: Strategy, batch_size: int, seed: int, stage: str, epoch: int) -> np.ndarray:
        """The order of the examples in one epoch of a stage."""
        return order(len(self), self.lengths, strategy, batch_size, seed, stage, epoch)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each example's longest row (examples,), or None where examples have no tokens."""
        if "input_ids" not in self._rows.column_names:
            return None
        lengths = pc.list_value_length(arrow(self._rows, "input_ids")).to_numpy().astype(np.int64)
        return lengths.reshape(-1, self.members).max(axis=1)

    @property
    def example(self) -> int:
        """Bytes of a row that is kept in memory once it was made: the mean of some; 0 where none are kept."""
        if self._prepare is None or self.passing or not len(self._rows):
            return 0
        some = np.linspace(0, len(self._rows) - 1, min(3, len(self._rows))).astype(int).tolist()
        return sum(_size(value) for made in self._made(some) for value in made.values()) // len(some)

    @property
    def known_lengths(self) -> np.ndarray | None:
        """Tokens of each row, or of some rows where there is no end of them; None where rows have no tokens."""
        return self.single.lengths

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
