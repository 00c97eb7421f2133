"""Which parameters each stage opens: the recipe's patterns walked over the stages, and every pattern held to account.

The rule of the language: unfreezing a module trains the adapters inside it; where there are none, its weights. A
pattern that does nothing is a problem, and so is one tensor that is asked for in two ways. Pure, like the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine import prompts
from engine.adapters import Adapter, rewrites
from engine.errors import Key, Problem
from engine.outline import Outline, Parameter, below
from engine.part import one_or_many
from engine.patterns import Selection, moved, nearest, select
from engine.recipe import Recipe
from engine.schedules.base import StageEntry

ADAPTABLE = ("Linear", "Conv1D")
"""Kinds of module that a target pattern reaches inside what it names; whatever it names itself is taken at its word."""

NAMING = {"feedforward_modules"}
"""Fields of PEFT's configs that name modules, so that here they hold patterns."""


@dataclass(frozen=True)
class Opening:
    """What one `unfreeze` pattern of a stage opened."""

    pattern: str
    modules: tuple[str, ...]
    """The modules it names, outermost only."""
    what: str
    """`weights` or `adapters`, or both where it names several modules; `virtual tokens` of a kind of adapter."""


@dataclass(frozen=True)
class Attachment:
    """An adapter on its way to the modules it adapts."""

    name: str
    kind: str
    """PEFT's name of it."""
    fields: dict[str, Any]
    """Fields of its PEFT config class, as the recipe has them."""
    targets: tuple[str, ...]
    """Full names of the modules it goes to."""
    key: Key
    """Where the recipe asks for it."""


@dataclass(frozen=True)
class StageOpenings:
    """A stage and the parameters it trains."""

    index: int
    entry: StageEntry
    opens: tuple[Opening, ...]
    attaches: tuple[Attachment, ...]
    trainable: tuple[str, ...]
    rates: Mapping[str, float]
    """Trainable parameter -> its peak rate before layer-wise decay."""


@dataclass(frozen=True)
class Openings:
    """All stages of a recipe, and what is wrong with it."""

    stages: tuple[StageOpenings, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Change:
    """One pattern's turn: what it froze or opened."""

    pattern: str
    key: Key
    opens: bool
    names: frozenset[str]


Roots = dict[str, str]
"""Name of an open parameter -> the module whose unfreezing opened it; a tied tensor is here by each of its names."""


def resolve(recipe: Recipe, outline: Outline) -> Openings:
    """What each stage trains, and every problem of the recipe's patterns."""
    walk = _Walk(recipe, outline)
    try:
        listed = entries(recipe, outline)
    except ValueError as error:
        return Openings((), (Problem(("stages",), str(error), "ask for fewer, or write the stages as a list"),))
    staged = [(entry, key, walk.enter(entry, key, index == 0)) for index, (entry, key) in enumerate(listed)]
    adapters = _Adapters(walk, [entry for entry, _, _ in staged], [roots for _, _, (roots, _) in staged])
    stages = []
    for index, (entry, key, (roots, changes)) in enumerate(staged):
        trainable = adapters.trainable(index, roots)
        if not trainable and not adapters.open(index):
            walk.blame(key, f"stage `{entry.name}` trains nothing", "unfreeze something in it")
        opens = tuple(adapters.opening(index, change.pattern, roots) for change in changes if change.opens)
        opens += adapters.prompting(index)
        rates = _rates(walk, entry, key, trainable)
        stages.append(StageOpenings(index, entry, opens, adapters.attached(index), trainable, rates))
    return Openings(tuple(stages), tuple(dict.fromkeys(walk.problems)))


def entries(recipe: Recipe, outline: Outline) -> tuple[tuple[StageEntry, Key], ...]:
    """The recipe's stages, generated where it names a schedule, each with the key it stands at.

    Raises `ValueError` where the model has too few blocks for its schedule.
    """
    if isinstance(recipe.stages, tuple):
        return tuple((entry, ("stages", index)) for index, entry in enumerate(recipe.stages))
    generated = recipe.stages.entries(len(outline.blocks), recipe.training.learning_rate)
    return tuple((entry, ("stages",)) for entry in generated)


class _Walk:
    """Walks the stages in order, and keeps what is open and what is wrong."""

    def __init__(self, recipe: Recipe, outline: Outline):
        self.recipe, self.outline = recipe, outline
        self.problems: list[Problem] = []
        self.blamed: dict[str, Key] = {}
        """Parameter name -> the key that last froze or opened it."""
        listed = recipe.stages if isinstance(recipe.stages, tuple) else ()
        self.adapted = bool(recipe.adapters or any(stage.adapters for stage in listed))
        """Whether any stage has adapters, so that what is open may still come to train them."""
        heads = outline.head if recipe.task.new_head else ()
        self.roots: Roots = {name: next((head for head in heads if below(name, head)), "") for name in _names(outline)}

    def blame(self, key: Key, what: str, then: str = "") -> None:
        self.problems.append(Problem(key, what, then))

    def select(self, pattern: str, key: Key) -> Selection | None:
        """What a pattern names, or a problem where it names nothing."""
        try:
            selection = select(pattern, self.outline)
        except ValueError as error:
            self.blame(key, str(error))
            return None
        if selection.modules or selection.parameters:
            return selection
        near = ", ".join(nearest(pattern, self.outline))
        what = moved(pattern, self.outline) or f"`{pattern}` names no module of this model"
        self.blame(key, what, f"near: {near}" if near else "")
        return None

    def enter(self, entry: StageEntry, key: Key, first: bool) -> tuple[Roots, list[_Change]]:
        """Apply a stage's patterns on top of the stage before, freeze before unfreeze."""
        changes = [self._freeze(p, ("freeze", i)) for i, p in enumerate(self.recipe.freeze)] if first else []
        changes += [self._freeze(pattern, (*key, "freeze", i)) for i, pattern in enumerate(entry.freeze)]
        changes += [self._unfreeze(pattern, (*key, "unfreeze", i)) for i, pattern in enumerate(entry.unfreeze)]
        made = [change for change in changes if change]
        self._shadowed(made)
        self._tied()
        return dict(self.roots), made

    def _freeze(self, pattern: str, key: Key) -> _Change | None:
        selection = self.select(pattern, key)
        if selection is None:
            return None
        names = frozenset(name for name, _ in _selected(selection, self.outline))
        if not names & self.roots.keys():
            self.blame(key, f"`{pattern}` freezes nothing: all of it is frozen already", "remove it")
        for name in names:
            self.roots.pop(name, None)
            self.blamed[name] = key
        return _Change(pattern, key, False, names)

    def _unfreeze(self, pattern: str, key: Key) -> _Change | None:
        selection = self.select(pattern, key)
        if selection is None:
            return None
        opened = dict(_selected(selection, self.outline))
        if not opened.keys() - self.roots.keys() and not self.adapted:
            self.blame(key, f"`{pattern}` unfreezes nothing: it is all open already", "freeze it first, or remove it")
        self.roots.update(opened)
        self.blamed.update(dict.fromkeys(opened, key))
        return _Change(pattern, key, True, frozenset(opened))

    def _shadowed(self, changes: list[_Change]) -> None:
        """A change whose every parameter a later one of the same stage takes up again never had any say."""
        for index, change in enumerate(changes):
            later = changes[index + 1 :]
            rest = change.names.difference(*(other.names for other in later))
            if change.names and not rest:
                names = ", ".join(f"`{other.pattern}`" for other in later if other.names & change.names)
                what = f"`{change.pattern}` does nothing: the last word on all of it is {names}"
                self.blame(change.key, what, "remove it")

    def _tied(self) -> None:
        """One tensor can't be frozen by one of its names and train by another."""
        for parameter in self.outline.parameters:
            names = (parameter.name, *parameter.aliases)
            frozen = [name for name in names if name not in self.roots]
            if frozen and len(frozen) < len(names):
                trained = next(name for name in names if name in self.roots)
                key = self.blamed.get(frozen[0]) or self.blamed.get(trained) or ("freeze",)
                what = f"`{frozen[0]}` and `{trained}` are one tensor (tied weights), and only one of them is frozen"
                self.blame(key, what, "freeze or unfreeze both")


class _Adapters:
    """Which adapters are on in which stage, and what that makes of an open parameter."""

    def __init__(self, walk: _Walk, stages: list[StageEntry], roots: list[Roots]):
        self.walk, self.stages, self.roots = walk, stages, roots
        self.spans: list[tuple[int, int, Attachment]] = []
        """First and last stage of each adapter."""
        specs = [(adapter, ("adapters", i), 0) for i, adapter in enumerate(walk.recipe.adapters)]
        for index, stage in enumerate(stages):
            specs += [(adapter, ("stages", index, "adapters", i), index) for i, adapter in enumerate(stage.adapters)]
        for adapter, key, earliest in specs:
            self._place(adapter, key, earliest)

    def _place(self, adapter: Adapter, key: Key, earliest: int) -> None:
        if adapter.type in prompts.PROMPTS:
            self._prompt(adapter, key, earliest)
            return
        targets = self._targets(adapter, key, earliest)
        starts = [i for i in range(earliest, len(self.stages)) if any(self._open(t, i) for t in targets)]
        if not starts:
            return
        first = starts[0]
        ends = [i for i in range(first, len(self.stages)) if self.stages[i].then != "keep"]
        last = ends[0] if ends else len(self.stages) - 1
        kept = tuple(t for t in targets if any(self._open(t, i) for i in range(first, last + 1)))
        if rewrites(adapter.fields) and self.stages[last].then == "drop":
            what = f"`{adapter.type}` rewrites the weights below it for its start, so it can't be dropped"
            self.walk.blame(key, what, f"`then: merge` in stage `{self.stages[last].name}`, or another start")
        fields = self._fields(adapter, key, kept)
        self.spans.append((first, last, Attachment(self._name(adapter), adapter.type, fields, kept, key)))

    def _name(self, adapter: Adapter) -> str:
        again = sum(attachment.kind == adapter.type for _, _, attachment in self.spans)
        return adapter.type + (str(again + 1) if again else "")

    def _prompt(self, adapter: Adapter, key: Key, first: int) -> None:
        """Virtual tokens belong to no module: they train from the stage that lists them to the one that drops them."""
        recipe, kind = self.walk.recipe, adapter.type
        last = next((i for i in range(first, len(self.stages)) if self.stages[i].then != "keep"), len(self.stages) - 1)
        aims = bool(adapter.target_modules or adapter.exclude_modules)
        packed, again = getattr(recipe.task, "packing", False), recipe.training.activation_checkpointing
        if said := prompts.refusal(kind, adapter.fields, recipe.task.auto, aims=aims, packed=packed, recomputed=again):
            self.walk.blame(key, said)
        elif self.stages[last].then == "merge":
            what = f"`{kind}` can't be merged into weights, as stage `{self.stages[last].name}` asks for"
            self.walk.blame(key, what, "`then: drop` forgets it; kept to the end, it is saved beside the model")
        elif other := next((a.name for b, e, a in self.spans if a.kind in prompts.PROMPTS and first <= e), ""):
            self.walk.blame(key, f"`{other}` is on already, and a model has one prompt at a time", "drop it before")
        else:
            fields = {**adapter.fields, "task_type": prompts.TASKS[kind][recipe.task.auto]}
            self.spans.append((first, last, Attachment(self._name(adapter), kind, fields, (), key)))

    def _fields(self, adapter: Adapter, key: Key, targets: tuple[str, ...]) -> dict[str, Any]:
        """PEFT's fields, modules that are named by patterns among them by their full names."""
        fields = adapter.fields
        for field in NAMING & fields.keys():
            patterns = one_or_many(fields[field]) or ()
            named = [name for pattern in patterns for name in self._adaptable(str(pattern), (*key, field))]
            fields[field] = [target for target in targets if target in named]
            if patterns and not fields[field]:
                self.walk.blame((*key, field), f"`{patterns[0]}` names none of the modules that are adapted")
        return fields

    def _targets(self, adapter: Adapter, key: Key, earliest: int) -> tuple[str, ...]:
        """The modules that an adapter's patterns name, each pattern held to have at least one that some stage opens."""
        found: dict[str, None] = {}
        for index, pattern in enumerate(adapter.target_modules or ("@blocks",)):
            named = self._adaptable(pattern, (*key, "target_modules", index))
            if named and not any(self._open(t, i) for t in named for i in range(earliest, len(self.stages))):
                what = f"`{pattern}` lies in a part that no stage unfreezes, so its adapters would never train"
                self.walk.blame((*key, "target_modules", index), what, "unfreeze it in a stage, or aim elsewhere")
            found.update(dict.fromkeys(named))
        for index, pattern in enumerate(adapter.exclude_modules):
            for name in self._adaptable(pattern, (*key, "exclude_modules", index)):
                found.pop(name, None)
        return tuple(found)

    def _adaptable(self, pattern: str, key: Key) -> list[str]:
        selection = self.walk.select(pattern, key)
        if selection is None:
            return []
        outline = self.walk.outline
        named = set(selection.modules)
        return [
            module.name
            for module in outline.modules
            if outline.owned.get(module.name)
            and (module.name in named or module.kind.endswith(ADAPTABLE))
            and any(below(module.name, name) for name in named)
        ]

    def _open(self, module: str, stage: int) -> bool:
        return any(parameter.name in self.roots[stage] for parameter in self.walk.outline.owned.get(module, ()))

    def present(self, stage: int) -> list[Attachment]:
        return [attachment for first, last, attachment in self.spans if first <= stage <= last]

    def attached(self, stage: int) -> tuple[Attachment, ...]:
        return tuple(attachment for first, _, attachment in self.spans if first == stage)

    def open(self, stage: int) -> bool:
        """Whether any adapter trains, though the outline may not have its parameters yet."""
        return any(not each.targets or any(self._open(t, stage) for t in each.targets) for each in self.present(stage))

    def trainable(self, stage: int, roots: Roots) -> tuple[str, ...]:
        """Names of the parameters that train: adapters where the module that was unfrozen holds some, else weights."""
        always = {opening.pattern for opening in self.prompting(stage)}
        present = {attachment.name for attachment in self.present(stage)} - always
        adapted = self._adapted_roots(stage, roots)
        return tuple(
            parameter.name
            for parameter in self.walk.outline.parameters
            if (parameter.adapter in always and not parameter.name.endswith(prompts.FIXED))
            or (parameter.adapter in present and any(self._open(holder, stage) for holder in self._holders(parameter)))
            or (parameter.adapter is None and parameter.name in roots and roots[parameter.name] not in adapted)
        )

    def _holders(self, parameter: Parameter) -> set[str]:
        """The modules that an adapter's parameter works in: layers may share one (VB-LoRA's bank of vectors)."""
        targets = [target for _, _, attachment in self.spans for target in attachment.targets]
        return {parameter.module, *(t for t in targets for alias in parameter.aliases if below(alias, t))}

    def _adapted_roots(self, stage: int, roots: Roots) -> set[str]:
        targets = [target for attachment in self.present(stage) for target in attachment.targets]
        return {root for root in set(roots.values()) if any(below(target, root) for target in targets)}

    def prompting(self, stage: int) -> tuple[Opening, ...]:
        """The virtual tokens of a stage; they count as part of the embeddings."""
        on = [attachment for attachment in self.present(stage) if attachment.kind in prompts.PROMPTS]
        return tuple(Opening(attachment.name, self.walk.outline.embeddings, "virtual tokens") for attachment in on)

    def opening(self, stage: int, pattern: str, roots: Roots) -> Opening:
        selection = select(pattern, self.walk.outline)
        adapted = self._adapted_roots(stage, roots)
        outer = _outermost(selection.modules)
        what = {"adapters" if root in adapted else "weights" for root in outer or ("",)}
        return Opening(pattern, outer, " and ".join(sorted(what)))


def _rates(walk: _Walk, entry: StageEntry, key: Key, trainable: tuple[str, ...]) -> dict[str, float]:
    """The peak rate of each trainable parameter; in a mapping the last pattern that takes it has the word."""
    base = walk.recipe.training.learning_rate
    if not isinstance(entry.learning_rate, dict):
        return dict.fromkeys(trainable, entry.learning_rate or base)
    taken: dict[str, str] = {}
    named = {pattern: _rated(walk, entry, key, pattern, trainable) for pattern in entry.learning_rate}
    for pattern, names in named.items():
        taken.update(dict.fromkeys(names, pattern))
    for pattern, names in named.items():
        if names and pattern not in taken.values():
            what = f"`{pattern}` sets no rate: a later pattern has the last word on all of it"
            walk.blame((*key, "learning_rate", pattern), what, "put the narrower pattern last")
    return {name: entry.learning_rate.get(taken.get(name, ""), base) for name in trainable}


def _rated(walk: _Walk, entry: StageEntry, key: Key, pattern: str, trainable: tuple[str, ...]) -> list[str]:
    """The trainable parameters that a pattern of a `learning_rate` mapping takes, or a problem where there are none."""
    place = (*key, "learning_rate", pattern)
    selection = walk.select(pattern, place)
    if selection is None:
        return []
    owners = {parameter.name: parameter.module for parameter in walk.outline.parameters}
    named = [name for name in trainable if name in selection.parameters or _holds(selection, owners[name])]
    if not named:
        walk.blame(place, f"`{pattern}` sets the rate of nothing that trains in stage `{entry.name}`", "remove it")
    return named


def _holds(selection: Selection, module: str) -> bool:
    return any(below(module, name) for name in selection.modules)


def _names(outline: Outline) -> Iterable[str]:
    """Every name of every parameter of the model's own, tied ones by each of their names."""
    for parameter in outline.parameters:
        if parameter.adapter is None:
            yield parameter.name
            yield from parameter.aliases


def _selected(selection: Selection, outline: Outline) -> Iterator[tuple[str, str]]:
    """Each parameter name that a selection takes, with the outermost selected module around it (or itself)."""
    outer = _outermost(selection.modules)
    for name in _names(outline):
        root = next((module for module in outer if below(name, module)), None)
        if root is not None:
            yield name, root
        elif name in selection.parameters:
            yield name, name


def _outermost(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(m for m in modules if not any(m != other and below(m, other) for other in modules))
