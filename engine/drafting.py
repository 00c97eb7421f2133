"""A first recipe for a model, a task and data: commented, checked, and meant to be edited. Of the data it reads the
names of a local file's columns, and of the model nothing.

What it proposes is what holds for most: a new head first, then the upper blocks; where nothing is new, LoRA on the
upper blocks. Which layers are worth it for these very data is for `frostline advise` to measure.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import Problem, RecipeError
from engine.grammar.source import clean
from engine.load import load
from engine.tasks import TASKS, Task

FILES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
HEAD_FIRST = """\
# Everything starts frozen, and each stage unfreezes a part. A part is a pattern of module names (`encoder.layer.11`) or
# a selector that every model knows: @head, @embeddings, @blocks, @blocks[-4:], @norms, @biases.
freeze: ".*"

stages:
  # The new head starts at random and would send noise into the blocks: first it learns to read what they say already.
  - {name: head, unfreeze: "@head", epochs: 1, learning_rate: 1e-3}
  # Then the upper blocks learn what this task asks of them. `frostline plan` shows the cost of other choices.
  - {name: top, unfreeze: "@blocks[-4:]", epochs: 2, learning_rate: 5e-5}
"""
ADAPTERS = """\
# Everything starts frozen, and each stage unfreezes a part. A part is a pattern of module names (`model.layers.11`) or
# a selector that every model knows: @head, @embeddings, @blocks, @blocks[-8:], @norms, @biases.
freeze: ".*"

# Where an unfrozen part holds adapters they train, and its weights stay as they are. Without this key the weights do.
adapters:
  - {type: lora, r: 16, lora_alpha: 32}           # on every linear layer of the blocks; `target_modules` narrows it

stages:
  # `then: merge` adds what was learned to the weights, so that the saved model needs no PEFT to be loaded.
  - {name: upper, unfreeze: "@blocks[-8:]", epochs: 1, learning_rate: 2e-4, then: merge}
"""
TRAINING = """
training: {weight_decay: 0.01, warmup_steps: 0.1}  # warmup_steps below 1 is a share of each stage
batch_size: 32                                     # examples per step over all devices: the same on 1 and on 8
# per_device_batch_size: 8                         # if memory is short: the rest becomes gradient accumulation
# evaluation: loss                                 # the metric that decides what is best; the task has its own
seed: 42
"""


def write(model: str, task: str, data: str, to: Path) -> Path:
    """Write a first recipe into a new file and return it.

    Raises `RecipeError` where there is no such task, where the file exists, or where what was written isn't a recipe.
    """
    if to.exists():
        raise RecipeError([Problem((), f"{to} exists already, and nothing is overwritten", "name another file")])
    text = draft(model, _task(task), data, to)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")
    load(to)
    return to


def draft(model: str, task: type[Task], data: str, to: Path) -> str:
    """The text of a first recipe."""
    how = HEAD_FIRST if task.new_head else ADAPTERS
    look, train = following(model, data, to)
    lines = [
        f"# Made by `frostline init`. Look at it with `{clean(look)}`, train it with `{clean(train)}`.",
        "",
        f"model: {_quoted(model)}",
        f"task: {_name(task)}{_keys(task)}",
        *_data(_within(model, data)[0]),
        *_columns(task, _header(Path(data))),
        "\n",
    ]
    return "\n".join(lines) + how + TRAINING


def following(model: str, data: str, to: Path) -> tuple[str, str]:
    """The two commands that come next: look at the plan, train."""
    root = _within(model, data)[1]
    more = f" --data-root {shlex.quote(root)}" if root else ""
    return f"frostline plan {shlex.quote(str(to))}{more}", f"frostline run {shlex.quote(str(to))}{more}"


def _within(model: str, data: str) -> tuple[str, str]:
    """How a recipe names data, and their root where it isn't the folder that commands are given in."""
    try:
        place = Path(data)
        inside = not place.exists() or place.resolve().is_relative_to(Path.cwd())
        if inside or Path(model).exists():
            return data, ""
        return place.name, str(place.parent)
    except (OSError, ValueError):  # too long for a path, or with a null character: then it is none
        return data, ""


def _header(data: Path) -> list[str]:
    """The names of the columns of a local file of text; none where they can't be told."""
    try:
        with data.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline(2**16)
        if data.suffix.lower() in (".json", ".jsonl"):
            row = json.loads(line)
            return [str(name) for name in row] if isinstance(row, Mapping) else []
        if data.suffix.lower() not in (".csv", ".tsv"):
            return []
        return next(csv.reader([line], delimiter=max(",;\t|", key=line.count)), [])
    except (OSError, ValueError, RecursionError, csv.Error):
        return []


def _task(name: str) -> type[Task]:
    from difflib import get_close_matches

    known = {_name(task): task for task in TASKS}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        advice = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(known)}"
        raise RecipeError([Problem((), f"there is no task `{name}`", advice)])
    return known[name]


def _name(task: type[Task]) -> str:
    return task.model_fields["type"].annotation.__args__[0]  # pyright: ignore


def _keys(task: type[Task]) -> str:
    own = [name for name in task.model_fields if name != "type"]
    return f"   # or {{type: {_name(task)}, ...}} with its own keys: {', '.join(own)}" if own else ""


def _data(data: str) -> list[str]:
    """The lines of `data`: files by the builder that reads them, anything else by its name."""
    splits = (
        "  # splits: {validation: 0.1, test: test}   # left out: `validation` where there is one, else a tenth of train"
    )
    builder = FILES.get(Path(data).suffix.lower())
    if builder is None:
        return ["data:", f"  path: {_quoted(data)}", splits]
    return ["data:", f"  path: {builder}", f"  data_files: {{train: {_quoted(data)}}}", splits]


def _columns(task: type[Task], there: Sequence[str]) -> list[str]:
    """A line on the task's columns: a key where one is missing and one of yours is left over, else a comment."""
    wanted = [name for name in task.columns if name not in task.optional] or list(task.columns)[:2]
    found: dict[str, str] = {}
    for name, accepted in task.columns.items():
        free = (column for column in accepted if column in there and column not in found.values())
        if column := next(free, None):
            found[name] = column
    missing = [name for name in wanted if name not in found]
    rest = [column for column in there if column not in found.values()]
    if len(missing) == len(rest) == 1:
        found[missing[0]] = rest[0]
        named = ", ".join(f"{name}: {_quoted(found[name])}" for name in wanted)
        return [f"  columns: {{{named}}}"]
    shown = ", ".join(f"{name}: {name}" for name in wanted)
    theirs = (
        f"yours are {clean(', '.join(there[:12]))[:200]}" if there else "where yours have other names than the usual"
    )
    return [f"  # columns: {{{shown}}}   # {theirs}"]


def _quoted(text: str) -> str:
    """A text as a YAML scalar: plain where that can't be read as anything else."""
    plain = re.fullmatch(r"[A-Za-z][\w.+-]*(:?[\w.+/-]+)*", text) and text.lower() not in ("null", "true", "false")
    return text if plain else json.dumps(text, ensure_ascii=False)
