"""The JSON Schema of a recipe file, for editors: completion, hover and the first red line.

It follows from `Recipe` and takes everything that loading takes. A file may leave out what it extends, and `null`
removes what it extends, so the schema asks for less than a recipe does: `check` has the last word.
"""

from __future__ import annotations

from typing import Any

from engine.recipe import Recipe

Schema = dict[str, Any]

EXTENDS: Schema = {
    "type": "string",
    "description": "A file to take in, relative to this one: mappings merge, lists and scalars replace, null removes.",
}


def schema() -> Schema:
    """JSON Schema (draft 2020-12) of a recipe file."""
    whole = Recipe.model_json_schema()
    _loosen(whole, whole["$defs"], set())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "Frostline recipe",
        "properties": {"extends": EXTENDS, **whole["properties"]},
        "patternProperties": {"^x-": {"description": "Left out of the recipe; a place for YAML anchors."}},
    }


def _loosen(part: Schema, definitions: dict[str, Schema], seen: set[str]) -> None:
    """Let every mapping that merges with an extended one be partial, in place; list items never merge."""
    name = part.get("$ref", "").removeprefix("#/$defs/")
    if name and name not in seen:
        seen.add(name)
        _loosen(definitions[name], definitions, seen)
    if "oneOf" in part:
        # Partial mappings fit several alternatives at once.
        part["anyOf"] = part.pop("oneOf")
        part.pop("discriminator", None)
    for branch in part.get("anyOf", ()):
        _loosen(branch, definitions, seen)
    part.pop("required", None)
    for key, inner in part.get("properties", {}).items():
        _loosen(inner, definitions, seen)
        part["properties"][key] = _nullable(inner)
    if isinstance(inner := part.get("additionalProperties"), dict):
        part["additionalProperties"] = _nullable(inner)


def _nullable(inner: Schema) -> Schema:
    """A value that may be removed; what editors show of it stays on top."""
    shown = {key: inner[key] for key in ("description", "default", "title") if key in inner}
    rest = {key: value for key, value in inner.items() if key not in shown}
    branches = rest["anyOf"] if set(rest) == {"anyOf"} else [rest]
    nothing = {"type": "null"}
    return {**shown, "anyOf": branches if nothing in branches else [*branches, nothing]}
