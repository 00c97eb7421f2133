"""Writes `recipes/README.md`: which recipe is for what, from their comments, and every key, from its docstring."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.load import load  # noqa: E402
from engine.part import Part  # noqa: E402
from engine.recipe import Recipe  # noqa: E402
from engine.schedules import SCHEDULES  # noqa: E402
from engine.tasks import TASKS  # noqa: E402

HEAD = """\
# Recipes

Written by `scripts/handbook.py` from the comments of the recipes and the docstrings of the keys; don't edit it.

Each of these files runs as it is, and each is a test. Copy the one that is nearest to what you want, or let
`frostline init` write a first one, or `frostline import` read the config of another tool. The first line of a file
completes its keys in editors that know YAML's language server. `_team.yaml` is a part that others take in by `extends`.
"""
UNSAID = ("# yaml-language-server", "# pip install", "# git clone")
"""How lines of a recipe's comment begin that the page leaves out."""
KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "mapping",
}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
PREPARED = re.compile(r"\s*The quickstart (\([^)]*\) )?writes data/trec( and runs this file)?\.")

Schema = dict[str, Any]


def text() -> str:
    """The whole page."""
    return "\n".join([HEAD, *gallery(), *reference()])


def gallery() -> Iterator[str]:
    """Two tables: recipes that show a method, all on the same data, and recipes of a task."""
    files = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith("_"))
    methods = [path for path in files if "extends: trec.yaml" in path.read_text(encoding="utf-8")]
    yield from ["## By method", "", "All on the same questions, so that they can be compared.", ""]
    yield from ["| recipe | what it does | when | when not |", "| --- | --- | --- | --- |"]
    yield from (row(path, f"[{path.stem}]({path.name})") for path in methods)
    yield from [
        "",
        "## By task",
        "",
        "| recipe | task | what it does | when | when not |",
        "| --- | --- | --- | --- | --- |",
    ]
    tasks = {name_of(task): place for place, task in enumerate(TASKS)}
    named = sorted((tasks[kind], kind, path) for path in files if path not in methods for kind in [task_of(path)])
    yield from (row(path, f"[{path.stem}]({path.name}) | `{kind}`") for _, kind, path in named)
    yield ""


def row(path: Path, start: str) -> str:
    what, when, when_not = said(path)
    return f"| {start} | {cell(what)} | {cell(when)} | {cell(when_not)} |"


def said(path: Path) -> tuple[str, str, str]:
    """What a recipe does, with its paper; when to use it; and when not: the comment that it begins with."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += [] if line.startswith(UNSAID) else [line.removeprefix("#").strip()]
    found = re.fullmatch(r"(.*) When: (.*) When not: (.*)", PREPARED.sub("", " ".join(words)))
    if found is None or "https://" not in found[1]:
        raise SystemExit(f"{path}: its comment has to name a source, and to say `When:` and `When not:`")
    what, when, when_not = (words[0].upper() + words[1:] for words in found.groups())
    return what, when, when_not


def task_of(path: Path) -> str:
    return load(path).recipe.task.type


def name_of(part: type[Part]) -> str:
    """A task's or a schedule's own name."""
    return part.model_fields["type"].annotation.__args__[0]  # pyright: ignore


def reference() -> Iterator[str]:
    """Every key: those of a recipe, of its parts, of the tasks and of the schedules."""
    whole = Recipe.model_json_schema()
    definitions = whole["$defs"]
    yield from [
        "## Keys",
        "",
        "A scalar stands for the key in **bold**: `model: a/b` is short for `model: {path: a/b}`.",
        "",
    ]
    for value in whole["properties"].values():
        value.setdefault(
            "description", definitions.get(value.get("$ref", "").rpartition("/")[2], {}).get("description")
        )
    yield from table(whole, "")
    schedules = {schedule.__name__ for schedule in SCHEDULES}
    tasks = {task.__name__ for task in TASKS}
    for name in (
        "Model",
        "Data",
        "Splits",
        "Adapter",
        "StageEntry",
        "EarlyStopping",
        "Training",
        "Evaluation",
        "Cache",
    ):
        yield from section(definitions[name], name, "###")
    yield from ["## Tasks", "", "`task: text-classification`, or a mapping with it as `type` and its own keys.", ""]
    for task in TASKS:
        yield from section(definitions[task.__name__], name_of(task), "###", "type")
    yield from [
        "## Schedules",
        "",
        "`stages` as a mapping: its `type` generates the list of stages. `frostline plan --write` prints it.",
        "",
    ]
    for schedule in SCHEDULES:
        yield from section(definitions[schedule.__name__], name_of(schedule), "###", "type")
    spoken = schedules | tasks | {"Model", "Data", "Splits", "Adapter", "StageEntry", "EarlyStopping", "Training"}
    for name in sorted(definitions.keys() - spoken - {"Evaluation", "Cache"}):
        yield from section(definitions[name], name, "##")


def section(schema: Schema, name: str, level: str, *without: str) -> Iterator[str]:
    """A part's name, what its class says, and its keys."""
    short = ""
    if "properties" not in schema:
        short, schema = schema["anyOf"][0].get("title", "").lower().replace(" ", "_"), {**schema, **schema["anyOf"][1]}
    yield from [f"{level} {TITLES.get(name, name)}", "", " ".join(schema.get("description", "").split()), ""]
    if rest := {key: value for key, value in schema["properties"].items() if key not in without}:
        yield from table({**schema, "properties": rest}, short)


TITLES = {
    "Model": "`model`",
    "Data": "`data`",
    "Splits": "`data.splits`",
    "Adapter": "An adapter, in `adapters`",
    "StageEntry": "A stage, in `stages`",
    "EarlyStopping": "`early_stopping` of a stage",
    "Training": "`training`",
    "Evaluation": "`evaluation`",
    "Cache": "`cache`",
    "Augmentation": "`augmentation` of a task on pictures",
}
"""Parts -> what a user calls them."""


def table(schema: Schema, short: str) -> Iterator[str]:
    yield from ["| key | kind | left out | |", "| --- | --- | --- | --- |"]
    for key, value in schema["properties"].items():
        name = f"**`{key}`**" if key == short else f"`{key}`"
        needed = "needed" if key in schema.get("required", ()) else default(value)
        yield f"| {name} | {cell(kind(value))} | {needed} | {cell(value.get('description') or '')} |"
    yield ""


def default(value: Schema) -> str:
    """What holds where a key is left out, where that is a plain value."""
    said = value.get("default")
    if said is None or isinstance(said, dict | list):
        return ""
    if isinstance(said, bool):
        return f"`{str(said).lower()}`"
    return f"`{re.sub(r'e-0*', 'e-', f'{said:g}') if isinstance(said, float) else said}`"


def kind(value: Schema) -> str:
    """What a key takes, in words."""
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"]) if len(value["enum"]) < 9 else "a name"
    branches = [one for one in value.get("anyOf", value.get("oneOf", ())) if one.get("type") != "null"]
    if branches:
        return " or ".join(dict.fromkeys(map(kind, branches)))
    if "$ref" in value:
        return "mapping"
    if value.get("type") == "array":
        return f"list of {kind(value['items'])}" if "items" in value else "list"
    if value.get("type") == "object" and isinstance(inner := value.get("additionalProperties"), dict) and inner:
        return f"mapping to {kind(inner)}"
    limits = [f"{word} {value[key]}" for key, word in LIMITS.items() if key in value and abs(value[key]) < 2**60]
    return ", ".join([KINDS.get(value.get("type", ""), "anything"), *limits])


def cell(words: str) -> str:
    """Text that stays within its cell: no line breaks, no bars, links that can be followed."""
    words = re.sub(r"(?<!\()(https://[^\s,)]+)", r"<\1>", " ".join(words.split()))
    return re.sub(r"\(([^()]*?), <(https://[^>]+)>\)", r"([\1](\2))", words).replace("|", r"\|")


if __name__ == "__main__":
    (ROOT / "recipes/README.md").write_text(text(), encoding="utf-8")
    print("recipes/README.md")
