"""What a sweep goes through: depths of unfreezing, single units and windows, or a grid over any key of a recipe.

A point is a derived recipe, told as the overrides that a user could write on the command line. Pure: it reads names and
sizes, trains nothing, and knows nothing of results.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

from engine.errors import PlanError, Problem
from engine.outline import Outline, below
from engine.plan import Plan
from engine.planning.openings import entries, resolve
from engine.recipe import Recipe
from engine.schedules.base import StageEntry

HEAD, BODY = "head", "body"
"""The two stages of every depth: the head alone, then what the depth opens."""
HEAD_FIRST = StageEntry(name=HEAD, epochs=1.0, learning_rate=1e-3)
"""How a new head starts where the recipe doesn't say: at random it would send noise into the blocks."""
FACTORS = (1 / 3, 1.0, 3.0)
"""Rates that are tried at every depth, as multiples of the recipe's own: the best one moves with the depth."""
MOST_DEPTHS = 9
"""Depths up to which each is tried; of a deeper model a handful."""
WITHOUT_TEST = "data.splits.test="
"""What chooses must not see the test split, so the recipe of a point has none."""
TIMED = 24
"""Steps of a run that measures what a step takes."""
_LEFT = {"name", "freeze", "unfreeze", "learning_rate", "epochs", "steps"}
"""Keys of the recipe's own stages that a depth decides anew."""


@dataclass(frozen=True)
class Variant:
    """One way to train a point, such as one learning rate; the best of them speaks for the point."""

    name: str
    """Part of a folder's name; empty where there is one way alone."""
    words: tuple[str, ...]
    """`key=value` overrides on top of the recipe."""


@dataclass(frozen=True)
class Point:
    """One place of the curve."""

    name: str
    """How people and folders call it."""
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Opened:
    """What a depth unfreezes beside the head."""

    name: str
    patterns: tuple[str, ...] = ()

    @property
    def blocks(self) -> bool:
        """Whether it opens blocks, where adapters would sit."""
        return any(pattern.startswith("@blocks") for pattern in self.patterns)


@dataclass(frozen=True)
class Base:
    """What every depth has in common, read off the recipe's own stages."""

    recipe: Recipe
    outline: Outline
    plan: Plan

    @cached_property
    def stages(self) -> tuple[StageEntry, ...]:
        return tuple(entry for entry, _ in entries(self.recipe, self.outline))

    @cached_property
    def new_head(self) -> bool:
        """Whether there is a head that trains whatever the depth; a language model's own head is a part of it."""
        return bool(self.recipe.task.new_head and self.outline.head)

    @cached_property
    def first(self) -> int:
        """How many of the recipe's first stages leave blocks and embeddings alone."""
        deep = (*self.outline.blocks, *self.outline.embeddings)
        held = [any(below(name, part) for name in stage.trainable for part in deep) for stage in self.plan.stages]
        return held.index(True) if True in held else len(held)

    @cached_property
    def body(self) -> tuple[StageEntry, ...]:
        """The recipe's stages that train more than a head; all of them where there are none."""
        return self.stages[self.first :] or self.stages

    @cached_property
    def head(self) -> StageEntry:
        """The stage that trains the head alone before anything opens."""
        return self.stages[0] if self.first else HEAD_FIRST

    @cached_property
    def rates(self) -> tuple[float, float, float]:
        """Peak rates of the recipe: of what opens, of the head along with it, and of the head alone."""
        found = resolve(self.recipe, self.outline).stages
        heads = [name for name in found[0].rates if any(below(name, part) for part in self.outline.head)]
        late = [stage.rates for stage in found[self.first :]] or [stage.rates for stage in found]
        deep = [rate for rates in late for name, rate in rates.items() if name not in heads]
        along = [rate for rates in late for name, rate in rates.items() if name in heads]
        alone = [rate for stage in found[: self.first] for rate in stage.rates.values()]
        usual = self.recipe.training.learning_rate if self.first == len(found) else max(deep or along)
        return usual, max(along, default=usual), max(alone, default=HEAD_FIRST.learning_rate)  # pyright: ignore

    @property
    def length(self) -> dict[str, Any]:
        """How long what opens trains: as long as all stages of the recipe that open something."""
        if all(entry.epochs is not None for entry in self.body):
            return {"epochs": sum(entry.epochs or 0 for entry in self.body)}
        return {"steps": sum(self.plan.stages[self.stages.index(entry)].steps for entry in self.body)}

    @property
    def frozen(self) -> list[str]:
        """What every depth starts from: frozen but for the head and what belongs to it, such as a pooler."""
        parts = {"@embeddings": self.outline.embeddings, "@blocks": self.outline.blocks}
        return [selector for selector, modules in parts.items() if modules] if self.new_head else [".*"]


def opened(base: Base, depths: Sequence[str] = (), units: bool = False, window: int = 0) -> list[Opened]:
    """The depths to go through, each once: those named, or all, or a handful; then single units and windows.

    Raises `PlanError` where a depth is none of this model's.
    """
    count = len(base.outline.blocks)
    if not count:
        what = "this model has no repeated blocks, so there are no depths to go through"
        raise PlanError([Problem(("model",), what, "sweep over keys: `--over stages.NAME.unfreeze=PATTERN,PATTERN`")])
    found = [_depth(base, word, count) for word in depths or _usual(base, count)]
    if units:
        found += [Opened(f"block-{block}", (f"@blocks[{block}]",)) for block in range(count)]
        found += [Opened("embeddings", ("@embeddings",))] if base.outline.embeddings else []
    if window > 1:
        spans = [(low, low + window) for low in range(count - window + 1)]
        found += [Opened(f"blocks-{low}-{high - 1}", (f"@blocks[{low}:{high}]",)) for low, high in spans]
    distinct: dict[object, Opened] = {}
    for each in found:
        distinct.setdefault(_blocks(each, count), each)
    return list(distinct.values())


def _blocks(depth: Opened, count: int) -> object:
    """What a depth opens, the same for the top block and the last one by its number."""
    if found := re.fullmatch(r"@blocks\[(-?\d+)(:(\d*))?\]", depth.patterns[0] if len(depth.patterns) == 1 else ""):
        low = int(found[1]) % count
        return range(low, (int(found[3]) if found[3] else count) if found[2] else low + 1)
    return depth.patterns


def _usual(base: Base, count: int) -> list[str]:
    handful = {0, 1, 2, count // 4, count // 2, 3 * count // 4, count}
    depths = range(count + 1) if count < MOST_DEPTHS else sorted(handful)
    return [str(depth) for depth in depths if depth or base.new_head]


def _depth(base: Base, word: str, count: int) -> Opened:
    """A depth by its word: a number of blocks from the top, `all` blocks, or `full` for the embeddings as well."""
    if word == "full" and base.outline.embeddings:
        return Opened("full", ("@embeddings", "@blocks"))
    depth = count if word == "all" else int(word) if word.isdecimal() else -1
    if not 0 <= depth <= count:
        what = f"`{word}` is no depth of this model, which has {count} blocks"
        raise PlanError([Problem((), what, f"write numbers from 0 to {count}, `all` blocks or `full`")])
    if depth == 0 and not base.new_head:
        raise PlanError([Problem((), "this task brings no new head, so at depth 0 nothing trains", "begin at 1")])
    if depth == 0:
        return Opened(HEAD)
    return Opened("all-blocks" if depth == count else f"top-{depth}", (f"@blocks[-{depth}:]",))


def depth_points(
    base: Base, depths: Sequence[Opened], rates: Sequence[float] = (), steps: Mapping[str, int] | None = None
) -> tuple[Point, ...]:
    """A point for each depth, at each rate; `steps` says how long a depth trains where all take as many seconds.

    A head alone is tried at the same multiples of its own rate.
    """
    usual, _, alone = base.rates
    factors = [rate / usual for rate in rates] or FACTORS
    points = []
    for depth in depths:
        own = usual if depth.patterns else alone
        tried = [_rounded(own * factor) for factor in factors]
        points.append(Point(depth.name, tuple(_variant(base, depth, rate, steps) for rate in dict.fromkeys(tried))))
    return tuple(points)


def timing_point(base: Base, depth: Opened) -> Point:
    """A short run of a depth, to see what a step takes."""
    rate = base.rates[0] if depth.patterns else base.rates[2]
    first = [_lasting(_head(base), 1)] if base.new_head and depth.patterns else []
    stages = [*first, _lasting(_body(base, depth, rate), TIMED)]
    words = (*_common(base, depth), _stages(stages), "training.logging_steps=2", f"evaluation.eval_steps={TIMED}")
    return Point(f"timing-{depth.name}", (Variant("", words),))


def _variant(base: Base, depth: Opened, rate: float, steps: Mapping[str, int] | None) -> Variant:
    body, words = _body(base, depth, rate), _common(base, depth)
    if steps:
        body = _lasting(body, steps[depth.name])
        words = (*words, f"evaluation.eval_steps={-(-steps[depth.name] // max(1, evaluations(base)))}")
    first = [_head(base)] if base.new_head and depth.patterns else []
    return Variant(f"lr{rate:g}" + (f"-{steps[depth.name]}steps" if steps else ""), (*words, _stages([*first, body])))


def evaluations(base: Base) -> int:
    """How often a depth is judged on its way where every depth trains for as many steps."""
    every = base.recipe.evaluation.eval_steps or base.plan.stages[0].steps_per_epoch
    return max(1, round(length(base, Opened("any", ("@blocks",))) / every))


def length(base: Base, depth: Opened) -> int:
    """Steps of a depth's last stage; a head alone trains as long as it would before and along with the blocks."""
    told = _length(base, depth)
    return told["steps"] if "steps" in told else max(1, round(told["epochs"] * base.plan.stages[0].steps_per_epoch))


def _length(base: Base, depth: Opened) -> dict[str, Any]:
    if depth.patterns or not base.new_head:
        return base.length
    head, body = _plain(base.head, {"epochs", "steps"}), base.length
    if head.keys() == body.keys():
        return {key: head[key] + body[key] for key in body}
    per_epoch = base.plan.stages[0].steps_per_epoch
    return {"steps": sum(each.get("steps") or round(each["epochs"] * per_epoch) for each in (head, body))}


def _body(base: Base, depth: Opened, rate: float) -> dict[str, Any]:
    """The stage of what a depth opens, told as the recipe's last stage is."""
    usual, along, _ = base.rates
    last = base.body[-1]
    kept = {
        key: value for key, value in last.model_dump(exclude_defaults=True, mode="json").items() if key not in _LEFT
    }
    if not depth.blocks:
        kept.pop("adapters", None)
    stage: dict[str, Any] = {"name": BODY if depth.patterns else HEAD, **_length(base, depth), "learning_rate": rate}
    if depth.patterns:
        stage["unfreeze"] = list(depth.patterns)
        if base.new_head and along != usual:
            own = _rounded(along / usual * rate)
            stage["learning_rate"] = {**dict.fromkeys(depth.patterns, rate), "@head": own}
    return stage | kept


def _head(base: Base) -> dict[str, Any]:
    kept = base.head.model_dump(exclude_defaults=True, mode="json")
    stage = {key: value for key, value in kept.items() if key not in {"freeze", "unfreeze", "adapters", "then"}}
    return stage | {"name": HEAD, "learning_rate": base.rates[2]}


def _lasting(stage: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != "epochs"} | {"steps": steps}


def _plain(entry: StageEntry, keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key in sorted(keys) if (value := getattr(entry, key)) is not None}


def _common(base: Base, depth: Opened) -> tuple[str, ...]:
    """The overrides of a depth but for its stages: what is frozen at first, and no adapters where no blocks open."""
    bare = () if depth.blocks or not base.recipe.adapters else ("adapters=",)
    return (f"freeze={json.dumps(base.frozen)}", *bare)


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    return f"stages={json.dumps(stages)}"


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def grid(overs: Mapping[str, Sequence[str]]) -> tuple[Point, ...]:
    """A point for every combination of values of the recipe's keys."""
    return tuple(chosen(dict(zip(overs, values, strict=True))) for values in itertools.product(*overs.values()))


def chosen(values: Mapping[str, str]) -> Point:
    """The point of one value for each of some keys."""
    ends = [key.rpartition(".")[2] for key in values]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(values, ends, strict=True)}
    name = "_".join(f"{short[key]}-{value}" for key, value in values.items())
    return Point(_slug(name), (Variant("", tuple(f"{key}={value}" for key, value in values.items())),))


def _slug(name: str) -> str:
    """A name that a folder can have; where that loses something, a hash tells it from others."""
    plain = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    if plain == name:
        return plain
    return f"{plain}-{blake2b(name.encode(), digest_size=3).hexdigest()}".lstrip("-")


def overs(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`key=a,b,c` words as keys with their values; commas inside of brackets and quotes belong to a value.

    Raises `PlanError` where a word names no key or no value.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = tuple(dict.fromkeys(part.strip() for part in _parts(text)))
        if not equals or not key.strip() or not all(values):
            raise PlanError([Problem((), f"`--over {word}` names no key with values", "write `--over key.path=a,b`")])
        found[key.strip()] = values
    return found


def _parts(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        depth += not quote and (sign in "[{(") - (sign in "]})")
        if sign == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
