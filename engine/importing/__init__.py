"""Moving in: a config of another tool as a recipe, and a word on every line of it that has no counterpart here.

Each tool is a file here and a word in `TOOLS`. A recipe trains what that tool's own code would train, also where that
isn't what its author meant: a remark says so. Configs are read as data; nothing of them is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine import load
from engine.errors import Problem, RecipeError
from engine.grammar.reading import MOST_BYTES, Node, Place, read
from engine.grammar.source import Source
from engine.importing import commands, writing
from engine.importing.axolotl import Axolotl
from engine.importing.base import Given, Tool
from engine.importing.config import Config, Note
from engine.importing.finetuning_scheduler import FinetuningScheduler
from engine.importing.llama_factory import LlamaFactory
from engine.importing.ms_swift import COMMAND, MsSwift

TOOLS: tuple[type[Tool], ...] = (FinetuningScheduler, Axolotl, LlamaFactory, MsSwift)


@dataclass(frozen=True)
class Imported:
    """A recipe, and what became of each line that is not in it as it was."""

    text: str
    notes: tuple[Note, ...]


def carry(path: Path, tool: str = "", given: Given | None = None) -> Imported:
    """The recipe that does what another tool's config does; `tool` is its name where the file itself doesn't tell.

    Raises `RecipeError` where the file can't be read, is no tool's, or asks for what no recipe can.
    """
    given = given or Given()
    config = _config(path)
    reader = _reader(config, tool)
    draft = reader.read(config, given)
    config.rest(reader.answers, reader.silent)
    head = f"Made by `frostline import` from {path.name} of {reader.name}. What it couldn't carry over it has told."
    text = writing.text(draft.recipe(), draft.remarks, head)
    load.check(text, str(path))
    notes = sorted(config.notes, key=lambda note: (note.place.line, note.place.column))
    return Imported(text, tuple(dict.fromkeys(notes)))


def write(imported: Imported, to: Path) -> Path:
    """Write a recipe into a new file and return it. Raises `RecipeError` where the file exists."""
    if to.exists():
        raise RecipeError([Problem((), f"{to} exists already, and nothing is overwritten", "name another file")])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(imported.text, encoding="utf-8")
    return to


def _config(path: Path) -> Config:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem((), f"`{path}` can't be read: {error.strerror or error}")]) from None
    if path.suffix == ".sh":
        script = content[:MOST_BYTES].decode("utf-8", errors="replace")
        root, problems = commands.read(script, str(path), COMMAND), []
        if root is None:
            problems = [Problem((), f"`{path}` holds no `swift sft`, `swift pt` or `swift rlhf`")]
    else:
        root, problems = read(content, str(path), any_key=True)
    if problems or root is None or not isinstance(root.value, dict):
        problems = problems or [Problem((), f"`{path}` is no mapping of keys")]
        raise RecipeError(problems, Source(root or Node({}, _start(path)), (str(path),)))
    return Config(root, str(path))


def _start(path: Path) -> Place:
    return Place(str(path), 1, 1)


def _reader(config: Config, tool: str) -> Tool:
    names = ", ".join(f"`{each.name}`" for each in TOOLS)
    if tool and tool not in {each.name for each in TOOLS}:
        raise RecipeError([Problem((), f"`{tool}` is no tool whose configs can be read", f"there are {names}")])
    found = [each() for each in TOOLS if (each.name == tool if tool else each().knows(config))]
    if not found:
        what = f"`{config.file}` looks like a config of none of {names}"
        raise RecipeError([Problem((), what, "name the tool with `--from`")])
    return found[0]
