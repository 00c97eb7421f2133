"""The words of a command line: which of them are recipes, which are overrides, and what may name a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from engine.load import Loaded

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*([.\[].*?)?=", re.DOTALL)


def split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Paths, and the `key.path=value` overrides among them; what exists as a file is a path."""
    overrides = [word for word in words if _OVERRIDE.match(word) and not os.path.exists(word)]
    return [Path(word) for word in words if word not in overrides], overrides


def recipes(paths: Sequence[Path]) -> Iterator[Path]:
    """The recipe files that paths name: files themselves, and every YAML file below a folder."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.suffix in (".yaml", ".yml") and not hidden and file.is_file():
                yield file


def one_recipe(words: Sequence[str]) -> tuple[Loaded, str]:
    """The one recipe that a command is about, and the name of its runs: the file's own."""
    from engine.load import load

    paths, overrides = split(words)
    if len(paths) != 1:
        raise typer.BadParameter(f"give one recipe, not {len(paths)}")
    return load(paths[0], overrides), paths[0].stem


def run_name(name: str) -> str:
    """A run's name, once it is sure to be the name of a folder and not a way out of one."""
    if not re.fullmatch(r"[\w][\w.+-]{0,99}", name):
        raise typer.BadParameter(f"{name!r} can't name a run; use letters, digits, `-`, `_`, `.` and `+`")
    return name
