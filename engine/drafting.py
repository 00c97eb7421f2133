"""A first recipe for a model, a task and data: commented, checked, and meant to be edited. It reads none of the three.

What it proposes is what holds for most: a new head first, then the upper blocks; where nothing is new, LoRA on the
upper blocks. Which layers are worth it for these very data is for `frostline advise` to measure.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from engine.errors import Problem, RecipeError
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
    lines = [
        f"# Made by `frostline init`. Look at it with `frostline plan {to}`, train it with `frostline run {to}`.",
        "",
        f"model: {_quoted(model)}",
        f"task: {_name(task)}{_keys(task)}",
        *_data(data),
        *_columns(task),
        "\n",
    ]
    return "\n".join(lines) + how + TRAINING


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


def _columns(task: type[Task]) -> list[str]:
    """A line on the columns that the task looks for."""
    looked = ", ".join(f"{name}: {name}" for name in task.columns if name not in task.optional)
    named = looked or ", ".join(f"{name}: {name}" for name in list(task.columns)[:2])
    return [f"  # columns: {{{named}}}   # where yours have other names than the usual ones"]


def _quoted(text: str) -> str:
    """A text as a YAML scalar: plain where that can't be read as anything else."""
    plain = re.fullmatch(r"[A-Za-z][\w.+-]*(:?[\w.+/-]+)*", text) and text.lower() not in ("null", "true", "false")
    return text if plain else json.dumps(text, ensure_ascii=False)
