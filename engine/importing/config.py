"""Another tool's config while it is read: what each key says and where, and what is to be told of it.

Every key is either read by a tool or told to have no counterpart, so that nothing is lost in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from engine.errors import RecipeError
from engine.grammar.names import ELSEWHERE
from engine.grammar.reading import Node, Place, Slip, resolve
from engine.grammar.source import Source, clean

NOTHING = (None, "", False, [], {})
"""Values that ask for nothing, so that there is nothing to tell."""


@dataclass(frozen=True)
class Note:
    """What becomes of one key."""

    place: Place
    key: str
    what: str

    def __str__(self) -> str:
        return clean(f"{self.place}  {self.key}: {self.what}")


@dataclass
class Config:
    """The keys of a file, flat, with their places."""

    root: Node
    file: str
    notes: list[Note] = field(default_factory=list)
    _read: set[str] = field(default_factory=set)

    def has(self, *keys: str) -> bool:
        """Whether any of the keys asks for something."""
        return any(key in self.root.value and self.root.value[key].plain() not in NOTHING for key in keys)

    def take(self, key: str, default: Any = None) -> Any:
        """What a key says, which then counts as read; `default` where it is missing or says nothing."""
        self._read.add(key)
        node = self.root.value.get(key)
        value = None if node is None else node.plain()
        return default if value is None or value == "" else value

    def number(self, key: str, default: float | None = None) -> Any:
        """A number; one in quotes is one as well."""
        value = self.take(key, default)
        value = resolve(value) if isinstance(value, str) else value
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(key, "has to be a number")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value, however it is written."""
        value = self.take(key, default)
        return value.lower() in ("true", "yes", "on", "1", "auto") if isinstance(value, str) else bool(value)

    def words(self, key: str) -> list[str]:
        """A list of texts; one text holds several with commas between."""
        value = self.take(key, [])
        items = value if isinstance(value, list) else str(value).split(",")
        return [str(item).strip() for item in items if str(item).strip()]

    def items(self, key: str) -> list[Node]:
        """The items of a list, each with its place; a text alone is a list of one."""
        self._read.add(key)
        node = self.root.value.get(key, Node(None, Place(self.file)))
        if isinstance(node.value, list):
            return node.value
        return [] if node.value in NOTHING else [node]

    def place(self, key: str) -> Place:
        return self.root.keys.get(key, Place(self.file))

    def note(self, key: str, what: str, place: Place | None = None) -> None:
        """Say what becomes of a key that is there."""
        if place or key in self.root.value:
            self.notes.append(Note(place or self.place(key), key, what))

    def refuse(self, key: str, what: str, then: str = "") -> NoReturn:
        """There is no recipe for this. Raises `RecipeError`."""
        raise RecipeError([Slip((key,), what, then, self.place(key))], Source(self.root, (self.file,)))

    def rest(self, answers: Mapping[str, str], silent: Iterable[str] = ()) -> None:
        """Tell of every key that nobody has read and that asks for something."""
        for key in self.root.value:
            if key in self._read or key in silent or not self.has(key):
                continue
            self.note(key, answers.get(key) or ELSEWHERE.get(key) or "has no counterpart")
