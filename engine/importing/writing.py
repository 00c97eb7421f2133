"""A recipe's keys as the text of a recipe: short mappings on one line, what is worth a remark with one above it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from engine.grammar.reading import resolve

WIDEST = 118
GROUPS = ("freeze", "adapters", "stages", "training")
"""Keys that a line is left free before, but among the first three."""

_PLAIN = re.compile(r"[A-Za-z_/.][\w./+-]*")


def text(recipe: Mapping[str, Any], remarks: Mapping[str, str], head: str) -> str:
    """The text of a recipe: `head` as a comment, then every key that says something, each below its remark."""
    lines, last = [*_comment(head), ""], ""
    for key, value in recipe.items():
        if value in (None, "", [], {}):
            continue
        starts = key in GROUPS and (last not in GROUPS or key == "training")
        if lines[-1] and (starts or key in remarks):
            lines.append("")
        lines += [*_comment(remarks.get(key, "")), *_entry(key, value, 0)]
        last = key
    return "\n".join(lines) + "\n"


def _comment(words: str) -> list[str]:
    return wrap(words, WIDEST, initial_indent="# ", subsequent_indent="# ")


def _entry(key: str, value: Any, indent: int) -> list[str]:
    """The lines of one key: its value beside it where that fits, else below it."""
    start = f"{' ' * indent}{_scalar(key)}:"
    line = f"{start} {flow(value)}"
    listed = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if not isinstance(value, dict | list) or (len(line) <= WIDEST and not listed):
        return [line]
    return [start, *_block(value, indent + 2)]


def _block(value: Any, indent: int) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entry(key, inner, indent)
        return
    for item in value:
        line = f"{' ' * indent}- {flow(item)}"
        if len(line) <= WIDEST or not isinstance(item, dict):
            yield line
            continue
        first, *others = _block(item, indent + 2)
        yield f"{' ' * indent}- {first.strip()}"
        yield from others


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.12g}").replace("e+", "e")
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and isinstance(resolve(value), str):
        return value
    plain = value.isprintable() and "\\" in value
    # In single quotes a backslash is one, so that a pattern reads as it is.
    return "'" + value.replace("'", "''") + "'" if plain else json.dumps(value, ensure_ascii=False)
