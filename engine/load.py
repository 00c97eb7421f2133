"""A recipe file, what it extends and what the command line overrides -> a `Recipe`, or every problem of it at once.

`extends` takes in another file: mappings merge (one with another `type` replaces), lists and scalars replace, `null`
removes what was extended. Top-level keys that start with `x-` are dropped; they are there for anchors. Files lie inside
one folder tree and are small; nothing is downloaded and nothing of a recipe is run. No model is known here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from math import isfinite
from pathlib import Path

from pydantic import ValidationError

from engine.errors import Key, Problem, RecipeError
from engine.grammar import wording
from engine.grammar.reading import MOST_BYTES, Node, Place, Slip, read
from engine.grammar.source import Source
from engine.part import Part
from engine.patterns import lint
from engine.recipe import Recipe

COMMAND_LINE = "command line"
MOST_FILES = 8
"""Longest chain of `extends`, the recipe itself included."""
MOST_BYTES_TOGETHER = 1024 * 1024
PATTERN_KEYS = frozenset({"freeze", "unfreeze", "target_modules", "exclude_modules"})


@dataclass(frozen=True)
class Loaded:
    """A recipe, and where each of its keys was written."""

    recipe: Recipe
    source: Source


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """The recipe in a file, with `key.path=value` overrides on top.

    Raises `RecipeError` with every problem of the file and its source, which renders them with their places.
    """
    reading = _Chain(Path(path))
    root = reading.root()
    if root is not None:
        root = _overridden(root, overrides, reading.problems)
    source = Source(root or Node({}, Place(str(path), 1, 1)), reading.files)
    if root is None or not isinstance(root.value, dict):
        raise RecipeError(reading.problems, source)
    recipe, problems = _validated(root)
    if recipe is None or reading.problems or problems:
        raise RecipeError([*reading.problems, *problems], source)
    return Loaded(recipe, source)


def check(text: str, file: str) -> None:
    """Hold the text of a recipe that isn't in a file yet to all of the rules. Raises `RecipeError`."""
    root, problems = read(text, file)
    source = Source(root or Node({}, Place(file, 1, 1)), (file,))
    recipe, found = _validated(root) if root and not problems else (None, [])
    if recipe is None or found:
        raise RecipeError([*problems, *found], source)


def _validated(root: Node) -> tuple[Recipe | None, list[Problem]]:
    further = [*_further(root)]
    try:
        return Recipe.model_validate(root.plain(tuple)), further
    except ValidationError as error:
        found = wording.problems(error, root)
        # The recipe's own rules over all of its keys are told with a place by `_further`.
        return None, further + [problem for problem in found if problem.key or not further]


def scan(path: str | Path) -> None:
    """Hold a part of recipes, which isn't one by itself, to the rules of the text alone. Raises `RecipeError`."""
    chain = _Chain(Path(path))
    root = chain.root()
    if chain.problems:
        raise RecipeError(chain.problems, Source(root or Node({}, Place(str(path), 1, 1)), chain.files))


class _Chain:
    """Reads a file and what it extends, and keeps what is wrong with their texts."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[Problem] = []
        self.files: tuple[str, ...] = (str(path),)
        self.seen: list[Path] = []
        self.bytes = 0
        self.top = _top(path)

    def root(self) -> Node | None:
        return self._file(self.path, Place(str(self.path), 0), ())

    def slip(self, place: Place, what: str, then: str = "", key: Key = ()) -> None:
        self.problems.append(Slip(key, what, then, place))

    def _file(self, path: Path, place: Place, key: Key) -> Node | None:
        content = self._content(path, place, key)
        if content is None:
            return None
        node, problems = read(content, str(path))
        self.problems += problems
        if node is None:
            return None
        if not isinstance(node.value, dict):
            space = ", with a space behind each `:`" if isinstance(node.value, str) and ":" in node.value else ""
            self.slip(node.place, f"is {wording.described(node.value)}", f"a recipe is a mapping of keys{space}")
            return None
        own = {name: child for name, child in node.value.items() if not name.startswith("x-") and name != "extends"}
        node, extends = replace(node, value=own), node.value.get("extends")
        return node if extends is None else self._extended(node, extends, path)

    def _extended(self, node: Node, extends: Node, path: Path) -> Node | None:
        place = node.keys["extends"]
        key: Key = ("extends",)
        if not isinstance(extends.value, str) or not extends.value:
            self.slip(place, f"needs the path of a file, not {wording.described(extends.value)}", "", key)
            return node
        if len(self.files) >= MOST_FILES:
            self.slip(place, f"this is the {MOST_FILES}th file of a chain; that is too long to follow", "", key)
            return node
        target = Path(os.path.normpath(path.parent / extends.value))
        self.files = (*self.files, str(target))
        base = self._file(target, place, key)
        return node if base is None else merge(base, node)

    def _content(self, path: Path, place: Place, key: Key) -> bytes | None:
        try:
            if wrong := self._unfit(path, bool(key)):
                self.slip(place, *wrong, key)
                return None
            self.seen.append(path.resolve())
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links is a RuntimeError until Python 3.13
            self.slip(place, f"`{path}` can't be read: {getattr(error, 'strerror', None) or error}", "", key)
            return None
        self.bytes += len(content)
        if self.bytes > MOST_BYTES_TOGETHER:
            self.slip(place, f"the files are larger than {MOST_BYTES_TOGETHER // 1024} KiB together", "", key)
            return None
        return content

    def _unfit(self, path: Path, extended: bool) -> tuple[str, str] | None:
        resolved = path.resolve()
        shown = f"`{wording.cut(str(path))}` "
        if extended and not resolved.is_relative_to(self.top):
            return f"{shown}lies outside of the recipe's folder tree", "keep shared parts beside the recipes"
        if resolved in self.seen:
            return f"{shown}extends itself in a circle", "remove one `extends`"
        if path.is_dir():
            return f"{shown if extended else ''}is a folder", "name a file in it"
        if not path.is_file():
            lost = f"there is no file {shown.strip()}" if extended else "there is no such file"
            return lost, _near_file(path)
        return None


def _near_file(path: Path) -> str:
    stems = {other.stem: other.name for other in path.parent.glob("*.y*ml")}
    near = get_close_matches(path.stem, stems, n=1)
    return f"did you mean `{stems[near[0]]}`?" if near else ""


def _top(path: Path) -> Path:
    """The folder tree that a recipe may extend files of: its repository, or else its own folder."""
    try:
        folder = path.resolve().parent
    except (OSError, ValueError, RuntimeError):
        return Path("/nowhere")  # the file can't be read either, and that is told
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), folder)


def merge(base: Node, over: Node, short: str = "") -> Node:
    """`over` on top of `base`: mappings merge, anything else replaces, nothing (`null`) removes what `base` has.

    A scalar that `short` says is short for a mapping merges as that mapping, so `model: {revision: x}` adds to
    `model: a/b`.
    """
    if short and isinstance(over.value, dict) and isinstance(base.value, str):
        base = Node({short: base}, base.place, {short: base.place})
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or _differ(base, over):
        return over
    value, keys = dict(base.value), dict(base.keys)
    for name, child in over.value.items():
        if child.value is None and name in value:
            del value[name]
            continue
        inner = "" if short else _shorthands().get(name, "")
        value[name] = merge(value[name], child, inner) if name in value else child
        keys[name] = over.keys[name]
    return Node(value, over.place, keys)


def _differ(base: Node, over: Node) -> bool:
    """Whether two mappings are of two types, so that the keys of one mean nothing in the other."""
    types = [node.value["type"].value if "type" in node.value else None for node in (base, over)]
    return None not in types and types[0] != types[1]


@cache
def _shorthands() -> dict[str, str]:
    """Top-level key -> the key of its mapping that a plain scalar stands for."""
    short = {"task": "type"}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part) and field.annotation.shorthand:
            short[name] = field.annotation.shorthand
    return short


def _overridden(root: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            problems.append(_ill(f"`{wording.cut(override)}` is no override", "write `key.path=value`"))
            continue
        # A selector needs quotes in YAML; on a command line they would be eaten by the shell.
        node, wrong = (Node(text, _COMMANDED), []) if text.startswith("@") else _value(text)
        problems += [_ill(f"`{wording.cut(override)}` {problem.what}", problem.next) for problem in wrong]
        if node is not None:
            try:
                root = _set(root, path.strip(), node, "")
            except LookupError as error:
                problems.append(_ill(f"`{wording.cut(override)}`: {error.args[0]}", error.args[1]))
    return root


_COMMANDED = Place(COMMAND_LINE)


def _ill(what: str, then: str) -> Slip:
    return Slip((), what, then, _COMMANDED)


def _value(text: str) -> tuple[Node | None, list[Problem]]:
    if not text:
        return Node(None, _COMMANDED), []
    node, problems = read(text, COMMAND_LINE)
    return (_placed(node) if node else None), problems


def _placed(node: Node) -> Node:
    """A value of the command line, where lines and columns mean nothing."""
    if isinstance(node.value, dict):
        children = {name: _placed(child) for name, child in node.value.items()}
        return Node(children, _COMMANDED, dict.fromkeys(children, _COMMANDED))
    return Node([_placed(child) for child in node.value] if isinstance(node.value, list) else node.value, _COMMANDED)


def _set(node: Node, path: str, new: Node, name: str) -> Node:
    """The tree with `new` at a path such as `stages.top.learning_rate`; `LookupError` where a list has no such item."""
    if not path:
        return merge(node, new, _shorthands().get(name, ""))
    if isinstance(node.value, list):
        return _set_item(node, path, new)
    short = _shorthands().get(name, "")
    if not isinstance(node.value, dict):
        scalar = short and isinstance(node.value, str)
        node = Node({short: node}, node.place, {short: node.place}) if scalar else Node({}, _COMMANDED)
    step = _step(path, node.value)
    rest = path[len(step) :].removeprefix(".")
    value = {key: child for key, child in node.value.items() if rest or key != step or new.value is not None}
    if rest or new.value is not None or step not in node.value:
        old = node.value.get(step, Node(None, _COMMANDED))
        value[step] = _set(old, rest, new, step) if rest or step in node.value else new
    keys = node.keys if step in node.value and rest else {**node.keys, step: _COMMANDED}
    return replace(node, value=value, keys=keys)


def _step(path: str, known: Iterable[str]) -> str:
    """The first step of a path: the longest known key it begins with (a pattern as key has dots), else a word."""
    ends = {key for key in known if path == key or path.startswith((f"{key}.", f"{key}["))}
    return max(ends, key=len, default=re.split(r"[.\[]", path, maxsplit=1)[0] or path)


def _set_item(node: Node, path: str, new: Node) -> Node:
    found = re.match(r"\[?([^.\[\]]+)\]?\.?", path)
    word = found[1] if found else path
    names = [_name(item) for item in node.value]
    if word in names:
        index = names.index(word)
    elif re.fullmatch(r"\d{1,4}", word) and int(word) < len(names):
        index = int(word)
    else:
        near = get_close_matches(word, [name for name in names if name], n=1)
        here = f"it has {len(names)}, by index or name: {', '.join(name or str(i) for i, name in enumerate(names))}"
        raise LookupError(f"the list has no item `{wording.cut(word)}`", f"did you mean `{near[0]}`?" if near else here)
    rest = path[found.end() :] if found else ""
    changed = [] if not rest and new.value is None else [_set(node.value[index], rest, new, "")]
    return replace(node, value=[*node.value[:index], *changed, *node.value[index + 1 :]])


def _name(item: Node) -> str:
    name = item.value.get("name") if isinstance(item.value, dict) else None
    return name.value if name and isinstance(name.value, str) else ""


def _further(root: Node) -> Iterable[Problem]:
    """What is wrong with a recipe beyond the kinds of its values."""
    yield from _numbers(root, ())
    yield from _patterns(root, ())
    yield from _stage_names(root)
    for adapters, key in _adapter_lists(root):
        for index, adapter in enumerate(_items(adapters)):
            for name in adapter.value if isinstance(adapter.value, dict) else ():
                if then := wording.adapter_key(name):
                    yield Problem((*key, index, name), "no such key", then)


def _children(node: Node) -> Iterable[tuple[str | int, Node]]:
    if isinstance(node.value, dict):
        return node.value.items()
    return enumerate(_items(node))


def _items(node: Node | None) -> list[Node]:
    return node.value if node and isinstance(node.value, list) else []


def _numbers(node: Node, key: Key) -> Iterable[Problem]:
    if isinstance(node.value, float) and not isfinite(node.value):
        yield Problem(key, "has to be a finite number")
    for step, child in _children(node):
        yield from _numbers(child, (*key, step))


def _patterns(node: Node, key: Key) -> Iterable[Problem]:
    """What is wrong with patterns, wherever a recipe takes one."""
    for step, child in _children(node):
        here = (*key, step)
        if step in PATTERN_KEYS:
            for place, item in [(here, child), *(((*here, i), item) for i, item in enumerate(_items(child)))]:
                yield from _pattern(place, item.value)
        elif step == "learning_rate" and key and isinstance(child.value, dict):
            for pattern in child.value:
                yield from _pattern((*here, pattern), pattern)
        else:
            yield from _patterns(child, here)


def _pattern(key: Key, value: object) -> Iterable[Problem]:
    if isinstance(value, str) and (wrong := lint(value)):
        what, _, then = wrong.partition("; ")
        yield Problem(key, f"`{wording.cut(value)}` {what}" if value else what, then)


def _stage_names(root: Node) -> Iterable[Problem]:
    names: dict[str, int] = {}
    for index, stage in enumerate(_items(root.value.get("stages"))):
        if (name := _name(stage)) in names:
            first = f"stage {names[name] + 1} is called `{wording.cut(name)}` already"
            yield Problem(("stages", index, "name"), first, "overrides and reports tell stages apart by name")
        elif name:
            names[name] = index


def _adapter_lists(root: Node) -> Iterable[tuple[Node, Key]]:
    if "adapters" in root.value:
        yield root.value["adapters"], ("adapters",)
    for index, stage in enumerate(_items(root.value.get("stages"))):
        if isinstance(stage.value, dict) and "adapters" in stage.value:
            yield stage.value["adapters"], ("stages", index, "adapters")
