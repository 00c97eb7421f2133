"""Where each key of a recipe was written, and how problems are shown there. It reads nothing and decides nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from engine.errors import Key, Problem
from engine.grammar.reading import Node, Place, Slip

MOST_LINES = 20
"""Lines of problems shown at once: one screen."""


def clean(text: str) -> str:
    """Text that is safe to print: nothing without a shape of its own, such as a control character or a mark that turns
    the direction of writing; breaks and spaces of any kind become plain spaces."""
    return "".join(sign if sign.isprintable() else " " if _is_space(sign) else "" for sign in text)


def _is_space(sign: str) -> bool:
    return sign == "\n" or unicodedata.category(sign) == "Zs"


class Source:
    """The merged text of a recipe: what it says, and who wrote it where."""

    def __init__(self, root: Node, files: tuple[str, ...]):
        self.root = root
        self.files = files
        """The file itself, then what it extends."""

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The merged mapping as plain values, for saving and comparing."""
        return self.root.plain()

    def place(self, key: Key) -> str:
        """`file:line:column` of a key, or of the nearest thing around it that is written somewhere."""
        return str(self.find(key))

    def find(self, key: Key) -> Place:
        """The place of a key; a part of the key below a scalar means the scalar."""
        node, place = self.root, Place(self.files[0], 1, 1)
        for part in key:
            if isinstance(node.value, dict):
                if str(part) not in node.value:
                    return place
                place, node = node.keys[str(part)], node.value[str(part)]
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                place = node.place
            else:
                return node.place
        return place

    def label(self, key: Key) -> str:
        """A key as users call it: `stages[top].unfreeze`, with a stage's name in place of its index."""
        label, node = "", self.root
        for part in key:
            known = isinstance(node.value, dict | list) if node else True
            if not known:
                break
            label += self._step(part, node, not label)
            node = _child(node, part)
        return label

    def _step(self, part: str | int, node: Node | None, first: bool) -> str:
        if isinstance(part, int):
            item = _child(node, part)
            name = item.value.get("name") if item and isinstance(item.value, dict) else None
            return f"[{name.value if name and isinstance(name.value, str) else part}]"
        plain = part.replace("_", "a").replace("-", "a").isalnum()
        return (part if first else f".{part}") if plain else f"[{part}]"

    def render(self, problems: Iterable[Problem]) -> str:
        """The problems in the order of their places, `file:line:column  key: sentence`, one a line and one screen."""
        lines = list(dict.fromkeys(self._line(problem) for problem in sorted(problems, key=self._order)))
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more"]
        return "\n".join(lines)

    def _where(self, problem: Problem) -> Place:
        return problem.place if isinstance(problem, Slip) else self.find(problem.key)

    def _order(self, problem: Problem) -> tuple[int, int, int]:
        place = self._where(problem)
        file = self.files.index(place.file) if place.file in self.files else len(self.files)
        return file, place.line, place.column

    def _line(self, problem: Problem) -> str:
        label = self.label(problem.key)
        return clean(f"{self._where(problem)}  {label}: {problem.sentence}" if label else self._unlabelled(problem))

    def _unlabelled(self, problem: Problem) -> str:
        return f"{self._where(problem)}  {problem.sentence}"


def _child(node: Node | None, part: str | int) -> Node | None:
    if node is None:
        return None
    if isinstance(node.value, dict):
        return node.value.get(str(part))
    if isinstance(node.value, list) and isinstance(part, int):
        return node.value[part] if part < len(node.value) else None
    return None
