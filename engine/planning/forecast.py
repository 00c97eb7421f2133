"""What a stage will cost: the frost line in FLOPs, bytes of memory, bytes of the cache, and how long that takes.

A pure function of the outline and of how long the examples are; seconds are FLOPs divided by a rate that somebody has
measured. A forecast decides nothing: what is replayed in fact is for the run to find out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

from engine.outline import Amount, Module, Outline, below
from engine.recipe import Recipe

ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
CAPTURED = 64
"""Most examples of one capturing forward pass."""
AT_ONCE, EXAMPLES, LEAST = 512, 16, 4
"""Of those, what a processor takes at once: so many tokens, or examples that have none, and at least some examples."""
WORTH = 0.1
"""Share of a forward pass that has to lie below the line for a replay."""
LIBRARIES = 55_000_000
"""Bytes of what is imported and made once when a model trains on a CPU: metrics, kernels, threads."""
LEFT = 0.3
"""Share of what comes and goes on a CPU that its allocator can't give to what comes next."""
HELD_OUT = 0.1
"""Rows to judge by as a share of those to train on, where nobody has counted them."""


@dataclass(frozen=True)
class Sizes:
    """What the data say of cost. Lengths are in tokens, 0 where examples have none."""

    train: int
    """Rows that go through the model by themselves; an example may have several."""
    validation: int
    mean: float = 0.0
    squared: float = 0.0
    """Mean of the squared lengths."""
    longest: int = 0
    known: bool = True
    """Whether these were counted, or are assumed."""
    example: int = 0
    """Bytes of one row that is kept in memory once it was made, as a decoded picture is; 0 where none are."""
    room: int = 0
    """Bytes that a split may keep of them."""

    @property
    def held(self) -> int:
        """Bytes of all rows that are kept in memory."""
        return sum(min(self.room, rows * self.example) for rows in (self.train, self.validation))

    @property
    def captured(self) -> int:
        """Examples of the longest that a processor captures at once."""
        return min(CAPTURED, max(LEAST, AT_ONCE // self.longest)) if self.longest else EXAMPLES

    @classmethod
    def assumed(cls, examples: int, tokens: int) -> Sizes:
        """As many tokens in each row as the model was tried with, and a tenth as many rows to judge by."""
        return cls(examples, round(examples * HELD_OUT), tokens, tokens**2, tokens, known=False)

    def lengthened(self, tokens: int) -> Sizes:
        """The same with so many tokens more in each row."""
        squared = self.squared + 2 * tokens * self.mean + tokens**2
        return replace(self, mean=self.mean + tokens, squared=squared, longest=self.longest + tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage at its peak."""

    weights: int
    optimizer: int
    """What it remembers, of what trained in earlier stages too."""
    gradients: int
    best: int
    """A copy of what trains, as it was when the model was best; always in the process's memory."""
    activations: int
    """What a micro-batch of the longest examples keeps for its way back."""
    forward: int
    """What a forward pass that keeps nothing takes: to fill the cache, or to judge."""
    total: int
    """On a GPU, as far as it is allocated; not all parts are needed at the same time."""
    process: int
    """On a CPU, on top of what the process takes before the model is loaded: libraries, copies and leftovers, too."""


@dataclass(frozen=True)
class Forecast:
    """What a stage will cost."""

    step_flops: float
    """Of one optimizer step, over all devices, what is replayed left out."""
    flops: float
    """Of the whole stage: its steps, its evaluations and filling the cache."""
    cache_bytes: int
    """What filling the cache takes on disk; 0 where nothing is kept."""
    memory: Memory
    seconds: float | None = None
    """An estimate: FLOPs over the rate of the machine that was asked; None where none was."""


class Costs:
    """The price of a model with some parameters trainable, by module."""

    def __init__(self, outline: Outline, trainable: Collection[str]):
        self.outline = outline
        self.trained = [p for p in outline.parameters if p.name in trainable]
        self.owners = {p.module for p in self.trained}
        # A bias has its gradient for nothing: it needs no input and no product.
        self.weights = {p.module for p in self.trained if p.adapter is None and len(p.shape) > 1}
        self.keepers = self.weights | {p.module for p in self.trained if p.adapter is not None}
        self.order = {m.name: rank if m.order is None else m.order for rank, m in enumerate(outline.modules)}

    @cached_property
    def first(self) -> str | None:
        """The first module in forward order that holds something trainable itself."""
        called = {module.name for module in self.outline.modules if module.order is not None}
        ranked = sorted((self.owners & called) or self.owners, key=lambda name: self.order[name])
        return ranked[0] if ranked else None

    @cached_property
    def line(self) -> str | None:
        """The block or part of the embeddings around it: the frost line lies right below."""
        parts = (*self.outline.blocks, *self.outline.embeddings)
        return next((part for part in parts if self.first and below(self.first, part)), self.first)

    @cached_property
    def above(self) -> list[Module]:
        """Modules that work above the line: those that come later, and those around it."""
        if self.first is None:
            return []
        start, around = self.order[self.first], self.first
        return [m for m in self.outline.modules if self.order[m.name] >= start or below(around, m.name)]

    def forward(self, sizes: Sizes | None = None, replayed: bool = False) -> float:
        """FLOPs of a forward pass on an example; of the average one, or as they were measured."""
        return sum(_work(m, sizes) for m in (self.above if replayed else self.outline.modules))

    def backward(self, sizes: Sizes | None = None) -> float:
        """FLOPs of the way back: f for the gradient of an input that is not the first, f for that of weights."""
        return sum(_work(m, sizes) * self._backs(m) for m in self.above)

    def _backs(self, module: Module) -> int:
        # Attention itself has no weights, but both of its inputs have gradients.
        passes = module.name != self.first
        return passes + (module.name in self.weights or (passes and module.name not in self.outline.owned))

    def kept(self, tokens: int, recomputed: bool = False, fused: bool = False) -> float:
        """Bytes of one example that the way back needs.

        `recomputed` where blocks keep only what they are given, `fused` where attention is computed in one go.
        """
        each = {m.name: self._keeps(m, tokens, fused) for m in self.above}
        inside = {name: sum(size for m, size in each.items() if below(m, name)) for name in self.outline.blocks}
        whole = sum(each.values())
        if not recomputed or not any(inside.values()):
            return whole
        given = sum(4 * m.price.takes.at(tokens) for m in self.outline.modules if inside.get(m.name))
        return whole - sum(inside.values()) + given + max(inside.values())

    def _keeps(self, module: Module, tokens: int, fused: bool) -> float:
        price = module.price
        kept = (price.keeps if module.name in self.keepers else price.passes).at(tokens)
        return kept if fused else kept + price.attention.at(tokens)

    def recomputed(self, sizes: Sizes) -> float:
        """FLOPs of computing the blocks above the line once more."""
        return sum(_work(m, sizes) for m in self.above if any(below(m.name, block) for block in self.outline.blocks))

    def turning(self, tokens: int) -> float:
        """Bytes of one example in the largest moment of the way back, beside what was kept for it."""
        return max((4 * (m.price.takes.at(tokens) + m.price.gives.at(tokens)) for m in self.above), default=0.0)

    def crossing(self, sizes: Sizes) -> float:
        """Elements that cross the line in an average example: what the first trainable module is given."""
        taken = next((m.price.takes for m in self.outline.modules if m.name == self.first), Amount())
        return taken.at(sizes.mean, sizes.squared)

    def passing(self, tokens: int, replayed: bool = False) -> float:
        """Bytes of one example in the largest moment of a forward pass that keeps nothing."""
        modules = self.above if replayed else self.outline.modules
        return max((_moment(m, tokens) for m in modules), default=0.0)


def _work(module: Module, sizes: Sizes | None) -> float:
    if sizes is None or module.price.work == Amount():
        return module.flops
    return module.price.work.at(sizes.mean, sizes.squared)


def _moment(module: Module, tokens: int) -> float:
    """What one module is given, hands on and makes on its way: of that, attention keeps the most."""
    price = module.price
    attention = price.attention.at(tokens)
    return 4 * (price.takes.at(tokens) + price.gives.at(tokens)) + price.passes.at(tokens) + attention


def forecast(
    recipe: Recipe, costs: Costs, sizes: Sizes, steps: int, steps_per_epoch: int, optimizer: int, copied: bool
) -> Forecast:
    """What a stage of so many steps costs.

    `optimizer` is bytes of its state, `copied` whether the best weights are kept. One device is taken to do it all.
    """
    replayed = _replayed(recipe, costs, sizes, steps, steps_per_epoch)
    rows = sizes.train / max(1, steps_per_epoch)  # of one step
    again = costs.recomputed(sizes) * recipe.training.activation_checkpointing
    step = rows * (costs.forward(sizes, replayed) + costs.backward(sizes) + again)
    judged = steps / (recipe.evaluation.eval_steps or steps_per_epoch) * sizes.validation
    captured = (sizes.train + sizes.validation) * (costs.forward(sizes) - costs.forward(sizes, True)) * replayed
    item = ITEM[recipe.cache.dtype]
    kept = replayed * (sizes.train + sizes.validation) * costs.crossing(sizes) * item
    return Forecast(
        step_flops=step,
        flops=steps * step + judged * costs.forward(sizes, replayed) + captured,
        cache_bytes=round(kept),
        memory=_memory(recipe, costs, sizes, rows, replayed, optimizer, copied, kept),
    )


def _replayed(recipe: Recipe, costs: Costs, sizes: Sizes, steps: int, steps_per_epoch: int) -> bool:
    """Whether a replay is to be expected: the run looks closer."""
    under = 1 - costs.forward(replayed=True) / (costs.forward() or 1.0)
    judged = sizes.validation / max(1, sizes.train) * steps / (recipe.evaluation.eval_steps or steps_per_epoch)
    wanted = recipe.cache.mode != "off" and not recipe.task.draws
    return wanted and costs.outline.measured and under >= WORTH and steps / steps_per_epoch + judged > 1


def _held(recipe: Recipe, costs: Costs, frozen: int) -> float:
    """Bytes of so many frozen elements; those of linear modules may take 8 or 4 bits each, or 16."""
    item, fields = ITEM[recipe.model.dtype], recipe.model.quantization_config
    if fields is None:
        return item * frozen - (item - ITEM[recipe.model.frozen_dtype or "float32"]) * costs.outline.narrow
    linear, trained = {m.name for m in costs.outline.modules if m.kind == "Linear"}, {p.name for p in costs.trained}
    matrices = (p for p in costs.outline.parameters if p.module in linear and p.adapter is None and len(p.shape) > 1)
    packed = sum(parameter.size for parameter in matrices if parameter.name not in trained)
    return item * (frozen - packed) + packed * (
        0.5 if fields.get("load_in_4bit") or "Int4" in str(fields.get("quant_type")) else 1.0
    )


def _memory(
    recipe: Recipe,
    costs: Costs,
    sizes: Sizes,
    rows: float,
    replayed: bool,
    optimizer: int,
    copied: bool,
    mapped: float,
) -> Memory:
    size = sum(parameter.size for parameter in costs.trained)
    # What adapters of other stages take is little.
    frozen = costs.outline.size - sum(parameter.size for parameter in costs.trained if parameter.adapter is None)
    weights = 4 * size + _held(recipe, costs, frozen)
    micro = min(recipe.per_device_batch_size or recipe.batch_size, recipe.batch_size)
    each = rows / recipe.batch_size  # an example may have several rows
    again, turning = recipe.training.activation_checkpointing, micro * each * costs.turning(sizes.longest)
    kept = [micro * each * costs.kept(sizes.longest, again, fused) for fused in (True, False)]
    judging = max(micro, 8) * each * costs.passing(sizes.longest, replayed)
    captured = costs.passing(sizes.longest) * replayed
    forward, there = max(judging, CAPTURED * captured), max(judging, sizes.captured * captured)
    gradients, best, adds = 4 * size, 4 * size * copied, recipe.batch_size > micro
    # Gradients come as activations go, unless earlier micro-batches have left theirs. A trial step keeps a copy of what
    # trains and has an optimizer of its own; the check of a replay has gradients twice.
    device, host = (
        max(
            optimizer + max(held + turning + gradients * adds, gradients),
            gradients + max(held + turning, gradients + optimizer),
            2 * gradients,
            optimizer + passing,
        )
        for held, passing in zip(kept, (forward, there), strict=True)
    )
    process = weights + host + best + LIBRARIES + LEFT * host + sizes.held + mapped
    parts = (weights, optimizer, gradients, best, kept[0], forward, weights + device, process)
    return Memory(*(round(part) for part in parts))
