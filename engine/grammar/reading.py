"""YAML text to a tree of plain values in which every key and value knows its place.

YAML 1.2: `1e-3` is a number, `no` is text. Limits are held while the text is read, before anything is built from it:
size, nodes with aliases expanded, depth, length of a scalar. There are no tags, no merge keys, one document, and keys
are text. Nothing here knows what a recipe is, and nothing of the text is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)
from ruamel.yaml.reader import ReaderError

from engine.errors import Problem, RecipeError

MOST_BYTES = 256 * 1024
MOST_NODES = 20_000
DEEPEST = 32
LONGEST_SCALAR = 16 * 1024

_INTEGER = re.compile(r"[-+]?[0-9]{1,40}")
_OTHER_BASE = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,32}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,400}|[0-9]{1,400}(\.[0-9]{0,400})?)([eE][-+]?[0-9]{1,9})?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}

_SYNTAX = (
    (r"found character '@'", 'what starts with `@` needs quotes: `"@blocks[-4:]"`'),
    (r"found character '\\t'|found a tab", "a tab can't indent; use spaces"),
    (r"found character '(.+)' that cannot start", r"text that starts with `\1` needs quotes"),
    (r"unknown escape character", "a backslash in double quotes begins an escape; use single quotes for patterns"),
    (r"expected escape sequence", "a backslash in double quotes begins an escape; use single quotes for patterns"),
    (r"mapping values are not allowed", "a `:` can't stand here; quote the text, or look at the indentation"),
    (r"sequence entries are not allowed", "a `- ` can't stand here; a list begins on a line of its own"),
    (r"could not find expected ':'", "this line has no `key: value`; look at the indentation and at quotes above"),
    (r"expected ',' or '\]'", "a list that opens with `[` isn't closed; a `]` or `,` is missing"),
    (r"expected ',' or '}'", "a mapping that opens with `{` isn't closed; a `}` or `,` is missing"),
    (r"unexpected end of stream", "a quote that opens before this is never closed"),
    (r"expected the node content", "a value is missing in front of this"),
    (r"expected '<document start>'", "the recipe has ended before this; look at the indentation"),
    (r"expected <block end>", "the indentation doesn't fit the lines above"),
)
"""What the parser says -> what a user understands."""


@dataclass(frozen=True)
class Place:
    """Where something is written; lines and columns count from 1, and 0 means the file as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Slip(Problem):
    """A problem with the text itself, where no key has been read yet that it could stand at."""

    place: Place = Place("")


@dataclass(frozen=True)
class Node:
    """A value of the text with its place: a scalar, a list of nodes, or a mapping from text to nodes."""

    value: Any
    place: Place
    keys: Mapping[str, Place] = field(default_factory=dict)
    """Places of a mapping's keys."""
    size: int = 1
    """Nodes below and including this one, aliases expanded."""
    height: int = 1

    def plain(self, sequence: type = list) -> Any:
        """The value without places; lists become `sequence`."""
        if isinstance(self.value, dict):
            return {key: child.plain(sequence) for key, child in self.value.items()}
        if isinstance(self.value, list):
            return sequence(child.plain(sequence) for child in self.value)
        return self.value


def read(content: bytes | str, file: str, any_key: bool = False) -> tuple[Node | None, list[Problem]]:
    """The tree of a YAML text (None where it can't be read) and everything that is wrong with the text.

    With `any_key` a key may be a number as well, as in other tools' files, and is taken as it is written.
    """
    reader = _Reader(file, any_key)
    try:
        return reader.read(reader.text(content)), reader.problems
    except RecipeError as error:
        return None, [*reader.problems, *error.problems]


class _Reader:
    """Walks the parser's events once, counting as it builds."""

    def __init__(self, file: str, any_key: bool):
        self.file = file
        self.any_key = any_key
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}
        self.nodes = 0
        self.events: Iterator[Any] = iter(())

    def text(self, content: bytes | str) -> str:
        if len(content) > MOST_BYTES:
            raise self.slip(None, f"is larger than {MOST_BYTES // 1024} KiB, the most a recipe may have")
        if isinstance(content, str):
            return content
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = content[: error.start]
            line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
            what = f"byte 0x{content[error.start]:02x} is no UTF-8"
            raise RecipeError([Slip((), what, "save the file as UTF-8", Place(self.file, line, column))]) from None

    def read(self, text: str) -> Node:
        self.events = YAML(typ="safe", pure=True).parse(text)
        try:
            return self.document()
        except ReaderError as error:
            raise self.unprintable(text, error) from None
        except MarkedYAMLError as error:
            raise self.syntax(error) from None
        except (YAMLError, ValueError, OverflowError) as error:
            # The parser lets these through for an escape such as `\UFFFFFFFF` that is no character.
            raise self.slip(None, f"can't be read as YAML: {error}") from None

    def slip(self, event: Any, what: str, then: str = "") -> RecipeError:
        return RecipeError([Slip((), what, then, self.place(event))])

    def place(self, event: Any) -> Place:
        mark = getattr(event, "start_mark", None)
        return Place(self.file, mark.line + 1, mark.column + 1) if mark else Place(self.file, 1, 1)

    def unprintable(self, text: str, error: ReaderError) -> RecipeError:
        at = int(error.position or 0)
        before = text[:at]
        place = Place(self.file, before.count("\n") + 1, at - before.rfind("\n"))
        return RecipeError(
            [Slip((), f"character U+{ord(text[at : at + 1] or ' '):04X} can't stand in YAML", "", place)]
        )

    def syntax(self, error: MarkedYAMLError) -> RecipeError:
        said = str(error.problem or error.context or error)
        mark = error.problem_mark or error.context_mark
        place = Place(self.file, mark.line + 1, mark.column + 1) if mark else Place(self.file, 1, 1)
        for found, words in ((re.search(pattern, said), words) for pattern, words in _SYNTAX):
            if found:
                return RecipeError(
                    [Slip((), found.expand(words.replace("\\", "\\\\").replace("\\\\1", "\\1")), "", place)]
                )
        return RecipeError([Slip((), f"is no YAML: {said}", "", place)])

    def document(self) -> Node:
        next(self.events)
        start = next(self.events)
        if isinstance(start, StreamEndEvent):
            raise self.slip(start, "is empty", "a recipe needs `model`, `task` and `data`")
        if isinstance(start, DocumentStartEvent) and start.version not in (None, (1, 2)):
            raise self.slip(start, "asks for another version of YAML", "a recipe is YAML 1.2; leave `%YAML` out")
        root = self.node(next(self.events), 1)
        next(self.events)
        if not isinstance(second := next(self.events), StreamEndEvent):
            raise self.slip(second, "a second document begins here", "a recipe is one document; remove the `---`")
        return root

    def node(self, event: Any, depth: int) -> Node:
        if isinstance(event, AliasEvent):
            return self.alias(event, depth)
        self.count(event, 1)
        if depth > DEEPEST:
            raise self.slip(event, f"lies deeper than {DEEPEST} levels", "a recipe is flatter than that")
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")[:60]
            self.problems += self.slip(event, f"`{tag}` is a tag", "a recipe has none").problems
        if event.anchor:
            self.anchors[event.anchor] = None
        node = self.built(event, depth)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def built(self, event: Any, depth: int) -> Node:
        if isinstance(event, ScalarEvent):
            return Node(self.scalar(event), self.place(event))
        return self.mapping(event, depth) if isinstance(event, MappingStartEvent) else self.sequence(event, depth)

    def count(self, event: Any, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MOST_NODES:
            raise self.slip(event, f"holds more than {MOST_NODES:,} values, aliases expanded", "make it smaller")

    def alias(self, event: Any, depth: int) -> Node:
        if event.anchor not in self.anchors:
            raise self.slip(event, f"`*{event.anchor}` stands for nothing", f"write `&{event.anchor}` before it")
        node = self.anchors[event.anchor]
        if node is None:
            raise self.slip(event, f"`*{event.anchor}` stands inside of what it stands for", "remove it")
        self.count(event, node.size)
        if depth + node.height - 1 > DEEPEST:
            raise self.slip(event, f"lies deeper than {DEEPEST} levels", "a recipe is flatter than that")
        return Node(node.value, self.place(event), node.keys, node.size, node.height)

    def sequence(self, event: Any, depth: int) -> Node:
        items = []
        while not isinstance(item := next(self.events), SequenceEndEvent):
            items.append(self.node(item, depth + 1))
        return self.closed(items, items, event, {})

    def mapping(self, event: Any, depth: int) -> Node:
        children: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        while not isinstance(first := next(self.events), MappingEndEvent):
            key, place = self.key(first, depth), self.place(first)
            value = self.node(next(self.events), depth + 1)
            if key is None:
                continue
            if key in keys:
                what = f"`{key[:60]}` is written twice; the first is in line {keys[key].line}"
                self.problems.append(Slip((), what, "remove one", place))
            keys[key], children[key] = place, value
        return self.closed(children, list(children.values()), event, keys)

    def closed(self, value: Any, children: list[Node], event: Any, keys: dict[str, Place]) -> Node:
        size = 1 + sum(child.size for child in children)
        height = 1 + max((child.height for child in children), default=0)
        return Node(value, self.place(event), keys, size, height)

    def key(self, event: Any, depth: int) -> str | None:
        if not isinstance(event, ScalarEvent):
            raise self.slip(event, "a key has to be text", "a list, a mapping or an alias can't be one")
        value = self.node(event, depth + 1).value
        if event.value == "<<":
            wrong = self.slip(event, "merge keys (`<<`) aren't understood", "write the keys out")
        elif self.any_key:
            return event.value
        elif not isinstance(value, str):
            wrong = self.slip(event, f"a key has to be text, not `{event.value[:60]}`", "put it in quotes")
        else:
            return value
        self.problems += wrong.problems
        return None

    def scalar(self, event: Any) -> Any:
        text = event.value
        if len(text) > LONGEST_SCALAR:
            raise self.slip(event, f"is a text of more than {LONGEST_SCALAR // 1024} KiB", "make it shorter")
        return resolve(text) if event.implicit[0] and not event.style else text


def resolve(text: str) -> Any:
    """What an unquoted scalar means by YAML 1.2's core schema: nothing, a truth value, a number or text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text
