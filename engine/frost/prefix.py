"""One split's frozen prefix: captured once, kept under the hash of all it depends on, fed before every forward pass.

It joins a frost line to a store and decides nothing about training. It is trusted only where a replay equals
recomputation, and it never keeps what was drawn at random.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import ceil
from pathlib import Path, PurePath
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from engine.devices import shards
from engine.frost import capturing
from engine.frost.capturing import Collate, Source, Survey
from engine.frost.replay import Line
from engine.frostline import Difference, Refusal, verify
from engine.keeping.durable import reason
from engine.store import DTYPES, Dtype, Store, TooLargeError, Writer, evict, own, padded

VERSION = 2
"""Raise it when tracing, capture or replay change what is kept."""
SHARD = 2048
"""Examples per store: what a killed run has finished isn't captured again, and devices share the shards."""
MOST_SHARDS = 64
UNRELATED = {"_name_or_path", "id2label", "label2id", "problem_type", "transformers_version", "architectures"}
"""Keys of a model's config that no activation depends on."""
TOLERANCE = {
    "float32": Difference(1e-5, 1e-5),
    "float16": Difference(1e-4, 1e-2),
    "bfloat16": Difference(1e-3, 5e-2),
    "int8": Difference(1e-3, 1e-1),
}
"""How far a replay may be from recomputation, by the coarsest of what is computed and what is kept."""


@dataclass(frozen=True)
class Cache:
    """Where and how activations are kept; equal on all devices but for `rank`."""

    folder: Path
    dtype: Dtype = "float32"
    """What they are stored as; float32 where a value is beyond it."""
    budget: int | None = None
    """Bytes that the folder may take; the stores that were not used for longest make room."""
    batch_size: int = 64
    """Most examples of one capturing forward pass."""
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns when every device has called it."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Told the examples captured so far, and those to capture, on this device."""


class Prefix:
    """What one split holds below one frost line."""

    def __init__(self, line: Line, source: Source, collate: Collate, seen: Survey, stores: Sequence[Store]):
        self.line, self.source, self.collate, self.survey, self.stores = line, source, collate, seen, tuple(stores)

    @classmethod
    def open(
        cls, line: Line, source: Source, collate: Collate, cache: Cache, ahead: Sequence[Line] = ()
    ) -> Prefix | Refusal:
        """What lies below `line` for every example of `source`: read from the folder, captured where it's missing.

        The lines `ahead`, those of later stages, are captured in the same pass; whether a replay of them can be trusted
        is for whoever opens them. On several devices each captures its share and reads the others'. A refusal may
        concern one device alone (a full disk), so ask all of them before relying on it.
        """
        found = cls._captured([line, *ahead], source, collate, cache)
        return found if isinstance(found, Refusal) else found[0]._trusted()

    @classmethod
    def open_all(cls, lines: Sequence[Line], source: Source, collate: Collate, cache: Cache) -> list[Prefix | Refusal]:
        """One capturing pass for several lines of one model, e.g. those of all stages of a schedule from the top down.

        What is captured for a later stage holds as long as nothing below its line trains before: a store's name
        contains the weights, so a stage that asks later finds the very same or captures anew.
        """
        found = cls._captured(lines, source, collate, cache)
        return [found] * len(lines) if isinstance(found, Refusal) else [each._trusted() for each in found]

    @classmethod
    def _captured(cls, lines: Sequence[Line], source: Source, collate: Collate, cache: Cache) -> list[Prefix] | Refusal:
        surveys = capturing.survey(lines, source, collate)
        if isinstance(surveys, Refusal):
            return surveys
        kept = _Keeping(lines, surveys, source, collate, cache)
        if sentence := kept.too_large():
            return Refusal(sentence)
        try:
            stores = kept.stores()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            return Refusal(f"the cache in {cache.folder} can't be written: {reason(error)}")
        parts = zip(lines, kept.surveys, stores, strict=True)
        return [cls(line, source, collate, seen, each) for line, seen, each in parts]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(store.size for store in self.stores)

    def feed(self, indices: Sequence[int], batch: Mapping[str, Any]) -> None:
        """Before a forward pass on the examples `indices`, collated into `batch`: give the line what they have."""
        self.line.feed(self.tensors(indices, batch))

    def tensors(self, indices: Sequence[int], batch: Mapping[str, Any]) -> list[Tensor]:
        """What crosses the line: one tensor per cut, padded like the batch, where the batch is."""
        mask = batch.get("attention_mask")
        device = next(value for value in batch.values() if isinstance(value, Tensor)).device
        left = mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all())
        tensors = []
        for slot, (tap, kind) in enumerate(zip(self.line.taps, self.survey.kinds, strict=True)):
            width = mask.shape[1] if mask is not None and kind == "tokens" else 0
            rows = self._rows(slot, list(map(int, indices)))
            batch_of = rows if isinstance(rows, Tensor) and not width else padded(list(rows), width, left)
            tensors.append(batch_of.to(device, tap.dtype))
        return tensors

    def _rows(self, slot: int, indices: list[int]) -> Tensor | list[Tensor]:
        """What some examples have at a cut; they were dealt out over the stores one by one."""
        if len(self.stores) == 1:
            return self.stores[0].rows(slot, indices)
        return [self.stores[index % len(self.stores)].row(slot, index // len(self.stores)) for index in indices]

    @cached_property
    def difference(self) -> Difference:
        """How far loss and gradients of a replay are from those of the full forward pass, the lengths being mixed."""
        order = capturing.by_length(self.source, range(len(self.source)))
        some = sorted({order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]})
        batch = capturing.on_device(self.collate(self.source.examples(some)), self.line)
        return verify(self.line.model, self.line, batch, self.tensors(some, batch))

    @property
    def tolerance(self) -> Difference:
        """How large the difference may be."""
        names = {str(self.line.coarsest).removeprefix("torch."), *(store.dtype for store in self.stores)}
        return max((TOLERANCE[name] for name in names if name in TOLERANCE), key=lambda each: each.gradient)

    def _trusted(self) -> Prefix | Refusal:
        """Itself, if a replay is as good as recomputation."""
        found, most = self.difference, self.tolerance
        if found.loss <= most.loss and found.gradient <= most.gradient:
            return self
        return Refusal(
            f"a replay is off by {found.loss:.0e} of the loss and {found.gradient:.0e} of the largest gradient: "
            "the model looks at padding or the examples of a batch look at each other"
        )


class _Keeping:
    """The stores of several lines: their names, their size, and how they come to be."""

    def __init__(
        self, lines: Sequence[Line], surveys: Sequence[Survey], source: Source, collate: Collate, cache: Cache
    ):
        self.lines, self.surveys, self.source, self.collate, self.cache = lines, surveys, source, collate, cache
        self.shards = min(MOST_SHARDS, ceil(len(source) / SHARD))
        contents, known = zip(lines, surveys, strict=True), Known()
        self.names = [content(line, source.fingerprint, seen.batch, known) for line, seen in contents]

    def too_large(self) -> str:
        """Why the stores don't fit the budget, or the empty string; a function of what all devices know."""
        elements = sum(sum(each.elements) for each in self.surveys) * len(self.source)
        size, budget = int(elements * DTYPES[self.cache.dtype].itemsize), self.cache.budget
        if budget is not None and size > budget:
            return f"the activations would take {size / 1e9:.2f} GB, and the cache may take {budget / 1e9:.2f} GB"
        if budget is not None:
            own(self.cache.folder)
            evict(self.cache.folder, budget - size, [n for s in range(self.shards) for n in self._names(s)])
        return ""

    def _names(self, shard: int, dtype: Dtype | None = None) -> list[str]:
        return [f"{name}-{dtype or self.cache.dtype}-{shard + 1}-of-{self.shards}" for name in self.names]

    def stores(self) -> list[list[Store]]:
        """Per line, its shards: this device's own first, then, when all are ready, those of the others."""
        own(self.cache.folder)
        mine = range(self.cache.rank, self.shards, self.cache.world)
        total, found = sum(len(self._indices(shard)) for shard in mine), {}
        try:
            for shard in mine:
                behind = sum(len(self._indices(other)) for other in found)
                found[shard] = self._shard(shard, lambda done, behind=behind: self.cache.progress(behind + done, total))
        finally:
            self.cache.wait()
        for shard in set(range(self.shards)) - set(found):
            found[shard] = self._shard(shard, lambda _: None)
        return [[found[shard][line] for shard in range(self.shards)] for line in range(len(self.lines))]

    def _indices(self, shard: int) -> range:
        return range(shard, len(self.source), self.shards)

    def _shard(self, shard: int, done: Callable[[int], None]) -> list[Store]:
        """Per line, its store of one shard; those that are missing are captured together."""
        dtypes = dict.fromkeys((self.cache.dtype, "float32"))
        found = [[Store.open(self.cache.folder, name) for name in self._names(shard, dtype)] for dtype in dtypes]
        stores = [next(filter(None, each), None) for each in zip(*found, strict=True)]
        if missing := [place for place, store in enumerate(stores) if store is None]:
            for place, store in zip(missing, self._captured(shard, missing, done), strict=True):
                stores[place] = store
        done(len(self._indices(shard)))
        return [store for store in stores if store is not None]

    def _captured(self, shard: int, missing: Sequence[int], done: Callable[[int], None]) -> list[Store]:
        try:
            return self._capture(shard, missing, done, self.cache.dtype)
        except TooLargeError:
            return self._capture(shard, missing, done, "float32")

    def _capture(self, shard: int, missing: Sequence[int], done: Callable[[int], None], dtype: Dtype) -> list[Store]:
        indices, names = self._indices(shard), self._names(shard, dtype)
        lines, surveys = [self.lines[place] for place in missing], [self.surveys[place] for place in missing]
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    Writer(self.cache.folder, names[place], line.cuts, len(indices), dtype, about(line.model))
                )
                for place, line in zip(missing, lines, strict=True)
            ]
            capturing.run(lines, surveys, writers, self.source, self.collate, indices, self.cache.batch_size, done)
            return [writer.publish() for writer in writers]


def about(model: nn.Module) -> str:
    """A model for people: its class, and the last part of where it came from."""
    origin = PurePath(str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")).name
    return f"{type(model).__name__} of {origin}" if origin else type(model).__name__


Known = dict[int, bytes]
"""The hashes of tensors by their `id`, for as long as nobody writes to them."""


def content(line: Line, fingerprint: str, batch: Mapping[str, Any], known: Known | None = None) -> str:
    """The name of what lies below a line: a hash of all that it depends on. What is hashed is added to `known`.

    That is the frozen weights and buffers below the line, where it runs, what is kept of it, the config, the
    examples, and the versions of torch, transformers and this file.
    """
    model, config = line.model, getattr(line.model, "config", None)
    settings = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in UNRELATED}
    facts = [
        [VERSION, torch.__version__, transformers.__version__],
        [type(model).__name__, next(model.parameters()).device.type, getattr(config, "_attn_implementation", "")],
        [line.cuts, line.rows, [str(tap.dtype) for tap in line.taps], str(line.coarsest), fingerprint],
        [settings, {name: str(adapter) for name, adapter in getattr(model, "peft_config", {}).items()}],
    ]
    facts.append([_adapter(module) for module in line.early if hasattr(module, "scaling")])
    digest = blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    digest.update(_weights(line, {} if known is None else known))
    _add(digest, ((key, value) for key, value in batch.items() if isinstance(value, Tensor)))
    return digest.hexdigest()


def _weights(line: Line, known: Known) -> bytes:
    """The hash of everything frozen below a line; made once, for a model takes longer to hash than a split to open."""
    written = tuple(tensor._version for _, tensor in line.prefix)  # counts writes in place
    if line.hashed is None or line.hashed[0] != written:
        whole = blake2b(digest_size=16)
        for name, tensor in line.prefix:
            if id(tensor) not in known:
                _add(one := blake2b(digest_size=16), [(name, tensor)])
                known[id(tensor)] = one.digest()
            whole.update(known[id(tensor)])
        line.hashed = written, whole.digest()
    return line.hashed[1]


def _adapter(module: Any) -> str:
    """What an adapter layer does beside its weights."""
    return repr((module.scaling, getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)))


def _add(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = shards.share(tensor.detach()).cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
