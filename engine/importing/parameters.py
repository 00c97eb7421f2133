"""Other tools choose parameters by their names; patterns here choose modules. This turns the one into the other.

A rule that looks at names from their start, or anywhere in them, takes every name that goes on behind what it says. So
a pattern ends in `[^.]*` where the rule stops inside a name and could go on, as `layers.1` does to `layers.10`. What
can't be said of whole modules is never guessed at: it comes back without a pattern. Nothing here knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from engine.patterns import lint

EVERYTHING = ".*"
BIASES = "@biases"
REST = "[^.]*"
"""The rest of a segment."""

_CLOSED_WORD = re.compile(r"(?:_proj|layernorm|LayerNorm|lm_head|embed_tokens|_embeddings|classifier|score|pooler)$")
"""Ends of names that no sibling's name goes on from, so that what stops there is whole."""
_LEAF = re.compile(r"\\?\.(?:weight|bias|\((?:\?:)?(?:weight\|bias|bias\|weight)\))$")
_ANY_LEAF = re.compile(r"(?:\\\.|\.)(?:\[a-z_?\]|\\w)\+$")
_OPEN_END = re.compile(r"(?:\\\.\*|\.[*+]\??)+$")
_COUNTED_DOT = re.compile(r"\.\{\d*,?\d*\}\.")
_NUMBER_SET = re.compile(r"\[(\d+)-(\d+)\]")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Translated:
    """A rule about parameters as a pattern of modules."""

    pattern: str | None
    """None where no pattern says it."""
    remark: str = ""
    """What the user should know of it."""


def of_prefix(text: str) -> Translated:
    """Names that start with a text."""
    return _checked(_one("^" + re.sub(r"([\\^$*+?{}\[\]|()])", r"\\\1", text).replace(".", r"\."), True))


def of_regex(expression: str, how: Literal["match", "search"]) -> tuple[Translated, ...]:
    """Names that a regular expression takes, from their start (`match`) or anywhere in them.

    That is one pattern, or one for each alternative where they can't stand together in one. Raises `ValueError` for
    what is no regular expression.
    """
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"`{expression}` is no regular expression: {error}") from None
    found = tuple(_one(part, how == "match") for part in _alternatives(expression))
    patterns = [each.pattern or "" for each in found]
    remarks = "; ".join(dict.fromkeys(each.remark for each in found if each.remark))
    # In one pattern an alternative may take nothing, as in the expression that it was.
    joined = _checked(Translated("|".join(dict.fromkeys(patterns)), remarks))
    if joined.pattern and not any(pattern in ("", BIASES) for pattern in patterns):
        return (joined,)
    return tuple(map(_checked, found))


def fold(patterns: Iterable[str]) -> list[str]:
    """Patterns that differ in one layer's number alone as one with all of the numbers; each once, in order."""
    numbers: dict[str, list[int]] = {}
    for pattern in dict.fromkeys(patterns):
        found = _LAYER.findall(pattern)
        key = _LAYER.sub("\0", pattern) if len(found) == 1 else pattern
        numbers.setdefault(key, []).extend(map(int, found if len(found) == 1 else ()))
    return [key.replace("\0", _either(sorted(set(layers)))) if layers else key for key, layers in numbers.items()]


def _either(numbers: list[int]) -> str:
    text = "|".join(map(str, numbers))
    return f"({text})" if len(numbers) > 1 else text


def _alternatives(expression: str) -> Iterator[str]:
    """The alternatives of an expression, each with the anchor that stood before all of them."""
    lead = "^" if expression.startswith("^") else ""
    body = expression.removeprefix("^")
    first, *others = _split(body)
    # Without brackets around them, an anchor binds to the first alternative alone.
    for part in (lead + first, *others):
        yield from _ungrouped(part)


def _ungrouped(part: str) -> Iterator[str]:
    """An expression that ends in a group as one for each of its alternatives, where that says where each of them ends.

    It does for a group that is all there is, and for one in which an alternative closes its segment.
    """
    behind = ".*" if part.endswith(").*") else ""
    start = _opening(part.removesuffix(".*"))
    if start is None or part.startswith(("(?=", "(?!", "(?<"), start):
        yield part
        return
    before, inner = part[:start], _split(part[start:].removesuffix(".*")[1:-1].removeprefix("?:"))
    if before.strip("^.*") and not any(alternative.endswith(r"\.") for alternative in inner):
        yield part
    else:
        yield from (before + alternative + behind for alternative in inner)


def _opening(text: str) -> int | None:
    """Where the group opens that closes at the end of a text."""
    if not text.endswith(")") or text.endswith(r"\)"):
        return None
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        if not text[:at].endswith("\\"):
            depth += (text[at] == ")") - (text[at] == "(")
        if not depth:
            return at
    return None


def _split(body: str) -> list[str]:
    parts, depth, escaped = [""], 0, False
    for sign in body:
        depth += 0 if escaped else (sign in "([") - (sign in ")]")
        if sign == "|" and not depth and not escaped:
            parts.append("")
        else:
            parts[-1] += sign
        escaped = sign == "\\" and not escaped
    return parts


def _one(text: str, anchored: bool) -> Translated:
    """One alternative: an expression over the name of a parameter, whose last segment is its module's own tensor."""
    if "(?=" in text or "(?!" in text or "(?<" in text:
        return Translated(None, "looks ahead or behind, beyond the name of a module")
    anchored, body = anchored or text.startswith("^"), text.removeprefix("^")
    if lead := re.match(r"\.[*+]\??", body):
        anchored, body = False, body[lead.end() :]
    closed = body.endswith("$") and not body.endswith(r"\$")
    body = body[:-1] if closed else body
    if not closed or _OPEN_END.search(body):
        body, closed = _OPEN_END.sub("", body), False
    if body.lstrip("\\.") == "bias":
        return Translated(None if anchored else BIASES)
    remark, whole = "", False
    if leaf := _LEAF.search(body) or (_ANY_LEAF.search(body) if closed else None):
        body, whole = body[: leaf.start()], True
        remark = _of_leaf(leaf[0], body)
    elif body.endswith(r"\."):
        body, whole = body[:-2], True
    if not body:
        return Translated(None if remark else EVERYTHING, remark)
    if closed and not whole:
        return Translated(None, "ends where no parameter's name does, so it takes none")
    return _written(body, anchored, whole, remark)


def _of_leaf(leaf: str, module: str) -> str:
    if leaf.endswith("bias") and "weight" not in leaf:
        return "one bias can't be had without its module's weight: patterns name modules"
    biased = not module.endswith(("embed_tokens", "_embeddings", "lm_head"))
    alone = leaf.endswith("weight") and "|" not in leaf and biased
    return "a module's weight comes with its bias, where it has one: patterns name modules" if alone else ""


def _written(body: str, anchored: bool, whole: bool, remark: str) -> Translated:
    if remark.startswith("one bias"):
        return Translated(None, remark)
    starts_segment = anchored or body.startswith(r"\.") or bool(re.match(_CLOSED_WORD.pattern[:-1], body))
    body = body.removeprefix(r"\.") if not anchored else body
    if _COUNTED_DOT.search(body):
        body = _COUNTED_DOT.sub(r"\\.\\d+\\.", body)
        remark = "a count behind a dot repeats the dot and counts no layers: every layer is taken, here as there"
    if any(len(found[0]) > 1 or len(found[1]) > 1 for found in _NUMBER_SET.findall(body)):
        body = _NUMBER_SET.sub(_digits, body)
        remark = "square brackets hold single digits and no range of numbers: the same digits are taken"
    body = re.sub(r"(?<=[A-Za-z_)\]+*])\\\.(?=[\w(\[])|(?<=\d)\\\.(?=[A-Za-z_(\[])", ".", body)
    end = "" if whole or _CLOSED_WORD.search(body) or body == "model.norm" else REST
    if end and body[-1].isdigit():
        remark = f"`{body}` is the start of other numbers too, which are taken as well, here as there"
    return Translated(("^" if anchored else "" if starts_segment else REST) + body + end, remark)


def _digits(found: re.Match[str]) -> str:
    """The digits that a set such as `[0-11]` holds: 0 and 1."""
    low, high = found[1], found[2]
    between = map(str, range(int(low[-1]), int(high[0]) + 1))
    return f"[{''.join(sorted({*low[:-1], *between, *high[1:]}))}]"


def _checked(translated: Translated) -> Translated:
    """A pattern that the language takes, or none."""
    if translated.pattern and (wrong := lint(translated.pattern)):
        return Translated(None, f"as a pattern it {wrong}")
    return translated
