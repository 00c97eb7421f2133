"""A stage's way past its frozen prefix: the frost line found, the cache filled, replay checked, and then trusted.

Where it would not pay, or replay differs from recomputation by more than rounding, the stage trains in full and the
reason is said. It never changes what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from engine import freezing
from engine.data import Split
from engine.frost.prefix import Cache, Prefix
from engine.frost.recomputing import above, recomputed
from engine.frost.replay import Line
from engine.frost.tracing import no_keys
from engine.frostline import Refusal, find


@dataclass
class Shortcut:
    """How the forward passes of a stage are computed."""

    model: nn.Module
    line: Line | None
    """The frost line, whether or not anything is replayed above it."""
    prefixes: dict[Split, Prefix] = field(default_factory=dict)
    said: str = ""
    """One sentence for the user: what is replayed, or why nothing is."""
    recomputed: tuple[nn.Module, ...] = ()
    """Blocks whose activations are computed again on the way back."""

    def train_mode(self) -> None:
        """Train mode above the line, eval mode below: the same with and without a cache."""
        self.line.train_mode() if self.line else freezing.train_mode(self.model)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, forward passes cost what lies above the line, or draw at random just what they would draw there.

        Whatever is computed, it makes no keys and values: training never reads them.
        """
        with recomputed(self.recomputed), self._passing():
            yield

    def _passing(self) -> AbstractContextManager[Any]:
        if self.line is None:
            return no_keys(self.model)
        return self.line.replaying() if self.prefixes else self.line.recomputing()

    def recompute(self) -> None:
        """Keep nothing of what blocks compute above the line, but compute it again on the way back."""
        self.recomputed = above(self.model, self.line)

    def feed(self, split: Split, indices: Sequence[int], batch: Mapping[str, Any]) -> None:
        """Before a forward pass on the examples `indices` of a split, collated into `batch`."""
        if self.prefixes:
            self.prefixes[split].feed(split.rows(indices), batch)


def open_shortcut(
    model: nn.Module,
    splits: Sequence[Split],
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    cache: Cache | None,
    passes: float,
    agreed: Callable[[str], str],
    off: str = "the recipe says `cache: off`",
    ahead: Sequence[Collection[str]] = (),
) -> Shortcut:
    """The shortcut of a stage whose flags are set; `cache` is None where nothing may be kept, and `off` says why.

    `collate` makes what the model itself takes. Rows that make up one example together are kept one by one.

    `passes` counts how often the stage goes over its training rows, evaluations included by their share of rows.
    `ahead` holds what trains in each stage to come that will want to replay as well: what lies below its frost line is
    captured in the same pass, unless something trains there before.
    `agreed` returns the first refusal of any process, given this one's: all of them replay, or none.
    """
    short = _two_short(model, splits[0].single, collate)
    found = find(model, short)
    line = found if isinstance(found, Line) else None
    if (reason := agreed(off if cache is None else _unwanted(found, passes))) or line is None or cache is None:
        return Shortcut(model, line, said=f"computes in full: {reason}")
    later = _later(model, short, ahead)
    for more in [later, []] if later else [[]]:  # where all of them are too much, this stage's own
        opened = {split: Prefix.open(line, split.single, collate, cache, more) for split in splits}
        if not (reason := agreed(next((each.reason for each in opened.values() if isinstance(each, Refusal)), ""))):
            break
    prefixes = {split: prefix for split, prefix in opened.items() if isinstance(prefix, Prefix)}
    if reason:
        return Shortcut(model, line, said=f"computes in full: {reason}")
    size = sum(prefix.size for prefix in prefixes.values())
    return Shortcut(model, line, prefixes, f"replays {line.saved:.0%} of a forward pass from {size / 1e6:,.1f} MB")


def _two_short(model: nn.Module, split: Split, collate: Callable[[Sequence[Any]], Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of two short examples, the cheapest that a trace learns everything from."""
    order = np.arange(len(split)) if split.lengths is None else np.argsort(split.lengths, kind="stable")
    device = next(model.parameters()).device
    batch = collate(split.examples(order[:2].tolist()))
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def _later(model: nn.Module, short: Mapping[str, Any], ahead: Sequence[Collection[str]]) -> list[Line]:
    """The frost lines of stages to come, as far as nothing trains below them until then."""
    parameters = freezing.parameters(model)
    moving, lines = {id(parameter) for parameter in freezing.trainable(model).values()}, []
    for names in ahead:
        found = find(model, short, trainable=names)
        if isinstance(found, Line) and not any(id(tensor) in moving for _, tensor in found.prefix):
            lines.append(found)
        moving |= {id(parameters[name]) for name in names}
    return lines


def _unwanted(found: Line | Refusal, passes: float) -> str:
    if isinstance(found, Refusal):
        return found.reason
    return "" if passes > 1 else "one pass over the rows would not pay for keeping them"
