"""What pydantic says about a recipe, in the words of whoever wrote it.

Every error becomes a `Problem` at a key that stands in the file (pydantic's own marks of which branch of a union it
tried are dropped), with what to write instead where that can be known. Nothing here decides what is right; the recipe
does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any, cast, get_args

from pydantic import ValidationError

from engine.errors import Key, Problem
from engine.grammar.names import ADAPTER_KEYS, ELSEWHERE, EXAMPLES, KEYS, VALUES
from engine.grammar.reading import Node, resolve
from engine.part import Part
from engine.recipe import Recipe

Error = Mapping[str, Any]

KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "`true` or `false`",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}
"""Pydantic's errors about the kind of a value -> the kind it asks for."""

_MISSING = "is missing"
_MEANT = "did you mean "
LIMITS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def problems(error: ValidationError, root: Node) -> list[Problem]:
    """Every error as a problem; the errors of a union's branches at one key become one."""
    groups: dict[Key, list[Error]] = {}
    for found in error.errors(include_url=False):
        groups.setdefault(_key(found, root), []).append(cast(Error, found))
    found = [
        problem
        for key, group in groups.items()
        if not _explained_below(key, group, groups)
        for problem in _problems(key, group)
    ]
    # Where `data` is missing and `dataset` is no such key, one line says both.
    meant = {(*problem.key[:-1], problem.next.split("`")[1]) for problem in found if problem.next.startswith(_MEANT)}
    return [problem for problem in found if problem.what != _MISSING or problem.key not in meant]


def unknown(name: str, parts: Iterable[type[Part]]) -> str:
    """What to do about a key that doesn't exist where keys of `parts` do."""
    here = list(dict.fromkeys(key for part in parts for key in _keys(part)))
    plain = name.lower().replace("-", "_")
    meant = plain if plain in here else KEYS.get(plain, "")
    if meant in here:
        return f"{_MEANT}`{meant}`?"
    if name.split(".")[0] in here:
        return f"write `{_nested(name)}`"
    if meant and (places := _places(meant, here)):
        return f"write {places}"
    if near := get_close_matches(name, here, n=1, cutoff=0.8):
        return f"{_MEANT}`{near[0]}`?"
    if places := _places(plain, here):
        return f"write {places}"
    if plain in ELSEWHERE:
        return ELSEWHERE[plain]
    if near := get_close_matches(name, here, n=1, cutoff=0.6):
        return f"{_MEANT}`{near[0]}`?"
    return f"the keys here are {_some(here, 6)}"


def _keys(part: type[Part]) -> list[str]:
    """What may be written in a part; `extends` is gone before a recipe is one."""
    return [*part.model_fields, "extends"] if part is Recipe else list(part.model_fields)


def described(value: Any) -> str:
    """A value as a user sees it, cut to a readable length."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return f"the text `{cut(value)}`" if value else "an empty text"
    return "a mapping" if isinstance(value, dict | Part) else "a list"


def cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def closest(value: str, allowed: Iterable[str]) -> str:
    """What was meant by a value that isn't one of those allowed."""
    choices = list(allowed)
    meant = VALUES.get(value.lower(), value.lower().replace("_", "-"))
    near = [meant] if meant in choices else get_close_matches(value.lower(), choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"it can be {_some(choices)}"


def _some(names: list[str], most: int = 10) -> str:
    """Names in backquotes, as many as a line bears."""
    quoted = [f"`{name}`" for name in names]
    return _either(quoted) if len(quoted) <= most else f"{', '.join(quoted[:most])}, ..."


def _either(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _key(error: Error, root: Node) -> Key:
    """Pydantic's location, without what isn't in the file; a missing key is kept, for it says what to add."""
    key: list[str | int] = []
    node, location = root, error["loc"]
    for index, part in enumerate(location):
        child = _child(node, part)
        if child is not None:
            key.append(part)
            node = child
        elif error["type"] == "missing" and index == len(location) - 1:
            key.append(part)
    return tuple(key)


def _child(node: Node, part: str | int) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(part)
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None


def _explained_below(key: Key, group: list[Error], groups: Iterable[Key]) -> bool:
    """Whether a value was only of the wrong kind for a branch of a union that its errors further down don't take."""
    deeper = any(len(other) > len(key) and other[: len(key)] == key for other in groups)
    return deeper and all(error["type"] in KINDS or error["type"] == "too_short" for error in group)


def _problems(key: Key, group: list[Error]) -> list[Problem]:
    others = [error for error in group if error["type"] not in KINDS]
    if isinstance(value := group[0]["input"], float) and not isfinite(value):
        return [Problem(key, "has to be a finite number")]
    if others:
        said = [_sentence(key, error) for error in others]
        return [Problem(key, what, then) for what, then in dict.fromkeys(said)]
    kinds = list(dict.fromkeys(KINDS[error["type"]] for error in group))
    return [Problem(key, f"needs {_either(kinds)}, not {described(value)}", _converted(key, value, kinds))]


def _converted(key: Key, value: Any, kinds: list[str]) -> str:
    """How to turn a value of the wrong kind into one of the right kind, where that is plain."""
    if "a list" in kinds and isinstance(value, dict):
        return "put it in a list: `[{...}]`, or `- ` in front of it"
    if key[0] == "stages" and isinstance(key[-1], int) and isinstance(value, str):
        return f"write `{{name: {cut(value)}, epochs: 1}}`"
    if not isinstance(value, str):
        return "leave the key out for the default" if value is None else ""
    if isinstance(resolve(value), int | float) and any("number" in kind or "true" in kind for kind in kinds):
        return "take the quotes away"
    truth = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
    return f"write `{truth}`" if truth and "`true` or `false`" in kinds else ""


def _sentence(key: Key, error: Error) -> tuple[str, str]:
    """What is wrong, and what to do."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "missing":
        return _MISSING, f"add `{EXAMPLES.get(str(key[-1]), f'{key[-1]}: ...')}`"
    if kind == "extra_forbidden":
        return "no such key", unknown(str(key[-1]), _parts_at(error["loc"][:-1]))
    if kind in LIMITS:
        return f"has to be {_BOUNDS[LIMITS[kind]]} {_number(context[LIMITS[kind]])}, not {_number(value)}", ""
    if kind == "literal_error":
        return _not_one_of(value, re.findall(r"'([^']*)'", context["expected"]))
    if kind == "union_tag_invalid":
        allowed = [tag for tag in re.findall(r"'([^']*)'", context["expected_tags"]) if tag != "list"]
        return f"has no type `{cut(str(context['tag']))}`", closest(str(context["tag"]), allowed)
    if kind == "union_tag_not_found":
        return _untyped(key, value)
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "too_short":
        return "is empty", "write at least one, or leave the key out for the default"
    if kind == "string_pattern_mismatch":
        return _misspelt(key, str(value))
    return error["msg"][:1].lower() + error["msg"][1:], ""


def _number(value: Any) -> str:
    if value == 2**63:
        return "2^63"
    return cut(str(value)) if isinstance(value, int) else f"{value:g}"


def _not_one_of(value: Any, allowed: list[str]) -> tuple[str, str]:
    text = value if isinstance(value, str) else described(value).removeprefix("the number ").strip("`")
    then = closest(text, allowed)
    return f"can't be `{cut(text)}`", then


def _untyped(key: Key, value: Any) -> tuple[str, str]:
    """A task or schedule without its `type`."""
    what = "is a mapping without a `type`" if isinstance(value, dict) else f"can't be {described(value)}"
    if key != ("stages",):
        return what, "write `task: text-classification`, or `task: {type: text-classification, ...}`"
    kind = VALUES.get(value, value) if isinstance(value, str) else ""
    known = [name for part in _parts_at(("stages",)) for name in get_args(_type(part))]
    example = f"{{type: {kind if kind in known else 'gradual'}, epochs: 1}}"
    return f"{what}; it is a list of stages or a mapping with a `type`", f"write `stages: {example}`"


def _misspelt(key: Key, value: str) -> tuple[str, str]:
    if key[-1] == "type":
        what = f"can't be `{cut(value)}`: PEFT's kinds are in lower case"
        return what, f"write `{re.sub(r'[^a-z0-9_]', '', value.lower()) or 'lora'}`"
    what = f"can't be `{cut(value)}`: a name is made of letters, digits, `-` and `_`"
    return what, f"write `{re.sub(r'[^A-Za-z0-9_-]+', '-', value).strip('-_') or 'head'}`"


def adapter_key(name: str) -> str:
    """What to do about a key of an adapter that PEFT calls something else, or "" where the key may be PEFT's own."""
    meant = ADAPTER_KEYS.get(name.lower())
    near = get_close_matches(name, ("type", "target_modules", "exclude_modules", "lora_alpha"), n=1, cutoff=0.85)
    meant = meant or (near[0] if near and near[0] != name else "")
    return f"did you mean `{meant}`?" if meant and meant != name else ""


def _parts(annotation: Any) -> list[type[Part]]:
    """Every part that an annotation may hold, itself or in a list, mapping or union."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _parts(inner)]


def _parts_at(location: Iterable[str | int]) -> list[type[Part]]:
    """The parts that may stand at a location of pydantic's."""
    parts: list[type[Part]] = [Recipe]
    for step in location:
        fields = [part.model_fields[step].annotation for part in parts if step in part.model_fields]
        if fields:
            parts = [inner for annotation in fields for inner in _parts(annotation)]
        elif step == "list":
            parts = [part for part in parts if "type" not in part.model_fields]
        elif isinstance(step, str):
            parts = [part for part in parts if step in get_args(_type(part))] or parts
    return list(dict.fromkeys(parts))


def _type(part: type[Part]) -> Any:
    return part.model_fields["type"].annotation if "type" in part.model_fields else None


def _places(name: str, here: list[str]) -> str:
    """Where a key lives, as a user would write it, or "" where there is none of that name."""
    if "." in name:
        first = name.split(".")[0]
        return f"`{_nested(name)}`" + ("" if first in Recipe.model_fields or first in here else " in a stage")
    if name in Recipe.model_fields:
        return f"`{name}` at the top of the recipe"
    tops = [f"{top}.{name}" for top in ("training", "evaluation", "model", "data") if name in _fields((top,))]
    tops += [f"data.splits.{name}"] if name in _fields(("data", "splits")) else []
    found = [f"`{_nested(top)}`" for top in tops]
    found += [f"`{name}` in a stage"] if name in _fields(("stages", "list")) else []
    return " or ".join(found)


def _nested(path: str) -> str:
    """`a.b.c` as one writes it in a recipe: `a: {b: {c: ...}}`."""
    *outer, last = path.split(".")
    return "".join(f"{step}: {{" for step in outer) + f"{last}: ..." + "}" * len(outer)


def _fields(location: Key) -> set[str]:
    return {key for part in _parts_at(location) for key in part.model_fields}
