"""The one pass over a split that captures what crosses one or several frost lines, without computing padding.

Examples are taken in the order of their length and in groups of one shape; what remains of padding is cut off before
anything is kept. It knows files only as something with `put`, and refuses what is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from engine.frost.replay import Line, capture
from engine.frostline import Refusal

Example = Mapping[str, Any]
Batch = Mapping[str, Any]
Collate = Callable[[Sequence[Any]], Batch]
Kind = Literal["fixed", "tokens", "other"]
"""What a kept row's first axis follows: nothing, the attention mask, or something else (frames of sound)."""
WINDOW = 512
"""Examples looked at together where only those of one shape may share a forward pass."""
TOKENS, EXAMPLES, LEAST = 512, 16, 4
"""What a processor computes at once: as many tokens, as many examples that have none, at least as many of any length.

Of more, each takes up to a quarter longer, for they leave the processor's own cache.
"""
LONGER = 1 / 16
"""Share by which an example may be longer than the shortest that it is padded with."""


class Source(Protocol):
    """The examples of one split."""

    def __len__(self) -> int: ...

    def examples(self, indices: Sequence[int]) -> Sequence[Example]:
        """Unpadded examples, ready to collate."""
        ...

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each example (examples,), or None where examples have no tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""
        ...


@dataclass(frozen=True)
class Survey:
    """What two examples say of all: how rows grow, how much they take, whether shorter ones may be padded."""

    examples: tuple[int, int]
    """The shortest and the longest."""
    rows: tuple[tuple[Tensor, ...], ...]
    """Per cut: the row of each, captured alone."""
    kinds: tuple[Kind, ...]
    """Per cut."""
    elements: tuple[float, ...]
    """Per cut: elements of an average row."""
    mixes: bool
    """Whether examples of different lengths may share a forward pass."""
    batch: Batch
    """Some examples, collated."""


def survey(lines: Sequence[Line], source: Source, collate: Collate) -> list[Survey] | Refusal:
    """Look at a few examples for each line, the shortest and the longest among them; refuse what never is the same."""
    if not len(source):
        return Refusal("there are no examples")
    order = by_length(source, range(len(source)))
    some = [order[place] for place in sorted({*np.linspace(0, len(order) - 1, 8).astype(int).tolist()})]
    batch, again = collate(source.examples(some)), collate(source.examples(some))
    if not same(batch, again):
        return Refusal("examples come out differently each time (augmentation or masking), so nothing can be kept")
    ends = (order[0], order[-1])
    batches = [on_device(collate(source.examples([index])), lines[0]) for index in ends]
    taps = [tap for line in lines for tap in line.taps]
    rows = [[without_padding(t, b, "other")[0] for t in capture(lines[0].model, taps, b)] for b in batches]
    surveys, first = [], 0
    for line in lines:
        end = first + len(line.taps)
        surveys.append(_surveyed(line, source, ends, batches, [each[first:end] for each in rows], batch))
        first = end
    return surveys


def _surveyed(
    line: Line,
    source: Source,
    ends: tuple[int, int],
    batches: Sequence[Batch],
    rows: Sequence[Sequence[Tensor]],
    batch: Batch,
) -> Survey:
    """What the shortest and the longest example say; `rows` holds what each has at the line's cuts."""
    kinds = [_kind(line, slot, batches, rows) for slot in range(len(line.taps))]
    masked = all("attention_mask" in each for each in batches) and source.lengths is not None
    encodes = bool(getattr(getattr(line.model, "config", None), "is_encoder_decoder", False))
    return Survey(
        examples=ends,
        rows=tuple(zip(*rows, strict=True)),
        kinds=tuple(kinds),
        elements=tuple(_average(short.numel(), long.numel(), source) for short, long in zip(*rows, strict=True)),
        mixes=masked and not encodes and "other" not in kinds,
        batch=batch,
    )


def _kind(line: Line, slot: int, batches: Sequence[Batch], rows: Sequence[Sequence[Tensor]]) -> Kind:
    short, long = (each[slot] for each in rows)
    if short.shape == long.shape and (line.taps[slot].row is not None or short.dim() == 1):
        return "fixed"
    masks = [batch.get("attention_mask") for batch in batches]
    follows = all(
        m is not None and m.dim() == 2 and m.shape[1] == len(r) for m, r in zip(masks, (short, long), strict=True)
    )
    if follows and len(short) < len(long):
        return "tokens"
    return "other"


def _average(short: int, long: int, source: Source) -> float:
    """Elements of an average row, which grow linearly with its length."""
    lengths = source.lengths
    if lengths is None or int(lengths.max()) == int(lengths.min()):
        return (short + long) / 2
    share = (float(lengths.mean()) - int(lengths.min())) / (int(lengths.max()) - int(lengths.min()))
    return short + share * (long - short)


def by_length(source: Source, indices: Sequence[int]) -> list[int]:
    """Indices, the shortest example first."""
    lengths = source.lengths
    return list(indices) if lengths is None else sorted(indices, key=lambda index: int(lengths[index]))


def room(source: Source, most: int, processor: bool) -> Callable[[int], int]:
    """Example -> how many share a forward pass where it is the longest: `most`, or what a processor takes at once."""
    lengths = source.lengths
    if not processor:
        return lambda _: most
    if lengths is None:
        return lambda _: min(most, EXAMPLES)
    return lambda index: min(most, max(LEAST, TOKENS // max(1, int(lengths[index]))))


def groups(
    source: Source, indices: Sequence[int], fits: Callable[[int], int], mixes: bool
) -> Iterator[tuple[list[int], list[Example]]]:
    """What shares a forward pass: neighbours in length where padding is cut off again, else examples of one shape."""
    order = by_length(source, indices)
    if mixes:
        for group in _neighbours(source, order, fits):
            yield group, list(source.examples(group))
        return
    for start in range(0, len(order), WINDOW):
        chosen = order[start : start + WINDOW]
        alike: dict[Any, list[tuple[int, Example]]] = {}
        for index, example in zip(chosen, source.examples(chosen), strict=True):
            alike.setdefault(_shape(example), []).append((index, example))
        for pairs in alike.values():
            most = fits(pairs[-1][0])
            for first in range(0, len(pairs), most):
                part = pairs[first : first + most]
                yield [index for index, _ in part], [example for _, example in part]


def _neighbours(source: Source, order: Sequence[int], fits: Callable[[int], int]) -> Iterator[list[int]]:
    """Stretches of an order by length: as many as fit, and once there are some, only those of about one length."""
    lengths = source.lengths
    assert lengths is not None
    group: list[int] = []
    for index in order:
        some = len(group) * int(lengths[group[0]] if group else 0) >= TOKENS / 4
        if group and (len(group) >= fits(index) or (some and lengths[index] > lengths[group[0]] * (1 + LONGER))):
            yield group
            group = []
        group.append(index)
    yield group


def _shape(example: Example) -> tuple[Any, ...]:
    """Sizes of an example's fields: equal for two examples that need no padding between them."""
    return tuple((key, _size(value)) for key, value in example.items())


def _size(value: Any) -> Any:
    if hasattr(value, "shape"):
        return tuple(value.shape)
    return len(value) if isinstance(value, (list, tuple)) else None


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same values."""
    (ours, kind), (theirs, its) = tree_flatten(dict(one)), tree_flatten(dict(other))
    return kind == its and all(
        torch.equal(value, found) if isinstance(value, Tensor) else value == found
        for value, found in zip(ours, theirs, strict=True)
    )


def on_device(batch: Batch, line: Line) -> Batch:
    """The batch where the line's model is."""
    device = next(line.model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def without_padding(tensor: Tensor, batch: Batch, kind: Kind) -> list[Tensor]:
    """One row per example; of tokens, those from the first to the last that the mask lets through."""
    mask = batch.get("attention_mask")
    if kind != "tokens" or mask is None:
        return list(tensor.cpu())
    return [row[_span(live)] for row, live in zip(tensor.cpu(), mask.cpu(), strict=True)]


def _span(live: Tensor) -> slice:
    places = live.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0)


class Rows(Protocol):
    """Something that keeps rows."""

    def put(self, index: int, rows: Sequence[Tensor]) -> None: ...


def run(
    lines: Sequence[Line],
    surveys: Sequence[Survey],
    sinks: Sequence[Rows],
    source: Source,
    collate: Collate,
    indices: range,
    most: int,
    done: Callable[[int], None],
) -> None:
    """One pass over the examples `indices`, which gives each line's rows to its sink, numbered from 0.

    `most` is the largest batch, a processor takes fewer; `done` is told how many examples are behind it.
    """
    taps = [tap for line in lines for tap in line.taps]
    kinds = [kind for each in surveys for kind in each.kinds]
    behind, device = 0, next(lines[0].model.parameters()).device
    fits = room(source, most, device.type == "cpu")
    for group, examples in groups(source, indices, fits, all(each.mixes for each in surveys)):
        batch = on_device(collate(examples), lines[0])
        rows = [
            without_padding(t, batch, kind) for t, kind in zip(capture(lines[0].model, taps, batch), kinds, strict=True)
        ]
        for place, index in enumerate(group):
            waiting = iter([each[place] for each in rows])
            for line, sink in zip(lines, sinks, strict=True):
                sink.put(indices.index(index), [next(waiting) for _ in line.taps])
        behind += len(group)
        done(behind)
