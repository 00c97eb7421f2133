"""A shell script as a config: the `--key value` words of one command in it, with their places. Nothing is run.

Variables are put in where the script itself gives them a plain value; everything else of a shell is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from engine.grammar.reading import Node, Place, resolve

_WORD = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+""")
_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")


@dataclass(frozen=True)
class _Spoken:
    """One word of a command, as it is after quotes are taken off."""

    text: str
    place: Place
    quoted: bool


def read(script: str, file: str, program: re.Pattern[str]) -> Node | None:
    """The keys of the last command that `program` matches, environment variables before it among them."""
    known: dict[str, str] = {}
    found = None
    for words in _commands(script, file):
        if match := program.search(" ".join(word.text for word in words)):
            found = _node([_put(word, known) for word in words], file, match[0])
        elif all(_ASSIGNED.fullmatch(word.text) for word in words if word.text != "export"):
            known |= _assignments([_put(word, known) for word in words])
    return found


def _commands(script: str, file: str) -> Iterator[list[_Spoken]]:
    """The commands of a script, each over all of the lines that a backslash joins."""
    words: list[_Spoken] = []
    for number, line in enumerate(script.splitlines(), 1):
        code = re.sub(r"(^|\s)#.*", "", line)
        joined = code.rstrip().endswith("\\")
        for found in _WORD.finditer(code.rstrip().removesuffix("\\") if joined else code):
            quoted = found[0][:1] in "'\""
            place = Place(file, number, found.start() + 1)
            words.append(_Spoken(_unquoted(found[0]), place, quoted))
        # A comment between joined lines would end the command in a shell; what follows is meant all the same.
        if not joined and not (words and line.strip().startswith("#")):
            yield words
            words = []
    yield words


def _unquoted(text: str) -> str:
    return re.sub(r"'([^']*)'|\"((?:\\.|[^\"\\])*)\"", lambda found: found[1] if found[2] is None else found[2], text)


def _put(word: _Spoken, known: dict[str, str]) -> _Spoken:
    """A word with the script's own variables in it."""

    def value(found: re.Match[str]) -> str:
        return known.get(found[1] or found[3], found[2] or found[0])

    return _Spoken(_VARIABLE.sub(value, word.text), word.place, word.quoted)


def _assignments(words: list[_Spoken]) -> dict[str, str]:
    matches = (_ASSIGNED.fullmatch(word.text) for word in words)
    return {match[1]: _unquoted(match[2]) for match in matches if match}


def _node(words: list[_Spoken], file: str, command: str) -> Node:
    values: dict[str, list[_Spoken]] = {}
    places: dict[str, Place] = {}
    key = ""
    for word in words:
        name = word.text.removeprefix("--").partition("=")
        if word.text.startswith("--"):
            key = name[0]
            values[key], places[key] = [], word.place
            if name[1]:
                values[key].append(_Spoken(name[2], word.place, True))
        elif key:
            values[key].append(word)
        elif match := _ASSIGNED.fullmatch(word.text):
            values[match[1]], places[match[1]] = [_Spoken(_unquoted(match[2]), word.place, False)], word.place
    values["command"], places["command"] = [_Spoken(command, words[0].place, True)], words[0].place
    return Node({key: _value(spoken, places[key]) for key, spoken in values.items()}, Place(file, 1, 1), places)


def _value(words: list[_Spoken], place: Place) -> Node:
    """A key's value: nothing behind it means that it holds, one word is a scalar, and more are a list."""
    items = [Node(resolve(word.text), word.place) for word in words]
    if not items:
        return Node(True, place)
    return items[0] if len(items) == 1 else Node(items, items[0].place)
