"""A staged run for tests of what it survives: four stages of a tiny BERT, started by the real command in forked ranks.

One process per rank, forked after the imports, so that a run costs a second and a kill hits nothing but the run.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import sklearn.metrics  # noqa: F401  what a rank needs, imported before a fork
import tiny
import torch
from safetensors.torch import load_file

from engine import cli, learner, start  # noqa: F401
from engine.keeping.proof import digests

Plant = Callable[[int], object]
"""What a test does to a rank, given its number, before the command begins in it."""

LORA = {"type": "lora", "target_modules": ["query", "value"], "r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
STAGES = (
    {"name": "head", "steps": 3, "learning_rate": 1e-2},
    {"name": "lora", "unfreeze": ["@blocks[-2:]", "@norms"], "adapters": [LORA], "steps": 4, "then": "merge"},
    {
        "name": "top",
        "freeze": "bert",
        "unfreeze": "@blocks[-2:]",
        "steps": 9,
        "learning_rate": 3e-2,
        "early_stopping": {"metric": "loss", "patience": 2},
    },
    {"name": "all", "unfreeze": "encoder", "steps": 4},
)
RECIPE: dict[str, Any] = {
    "model": "model",
    "task": "text-classification",
    "data": "rows",
    "freeze": "bert",
    "stages": list(STAGES),
    "training": {"learning_rate": 3e-3, "weight_decay": 0.01, "warmup_steps": 2, "logging_steps": 3, "save_steps": 2},
    "evaluation": {"metric": "accuracy", "eval_steps": 2},
    "batch_size": 8,
    "per_device_batch_size": 4,
    "seed": 3,
}
TIMED = {"seconds", "peak_bytes", "base_bytes"}
"""What two equal runs differ in."""


def place(root: Path, train: int = 22, validation: int = 13, **recipe: Any) -> Path:
    """A folder with the model, odd numbers of rows, and the recipe."""
    reviews = tiny.reviews(train + validation)
    tiny.save(tiny.bert(), root / "model")
    tiny.write_jsonl(root / "rows/train.jsonl", reviews[:train])
    tiny.write_jsonl(root / "rows/validation.jsonl", reviews[train:])
    write(root, **recipe)
    return root


def fresh(whole: Path, root: Path, **recipe: Any) -> Path:
    """The place of another run without that run, for a recipe with some of its keys replaced."""
    for part in ("model", "rows"):
        shutil.copytree(whole / part, root / part)
    write(root, **recipe)
    return root


def write(root: Path, **recipe: Any) -> None:
    """The recipe, with some of its keys replaced."""
    (root / "staged.yaml").write_text(json.dumps(RECIPE | recipe))  # JSON is YAML


def command(root: Path, *more: str) -> list[str]:
    return ["run", str(root / "staged.yaml"), "--runs", str(root / "runs"), "--data-root", str(root), *more]


def folder(root: Path) -> Path:
    return root / "runs/staged"


def run(root: Path, *more: str, ranks: int = 1, plant: Plant | None = None) -> list[int]:
    """The command on so many ranks; the exit code of each, minus the signal where one ended it."""
    return ends(begin(root, *more, ranks=ranks, plant=plant))


def begin(root: Path, *more: str, ranks: int = 1, plant: Plant | None = None) -> list[int]:
    """The ids of ranks that have the command under way; what they print lies in `root/rank-<n>.out`."""
    port = str(free_port())
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            one = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            _be_rank(root, command(root, *more), environment | one if ranks > 1 else {}, rank, plant)
        children.append(child)
    return children


def ends(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def _be_rank(root: Path, arguments: list[str], environment: Mapping[str, str], rank: int, plant: Plant | None) -> None:
    """What a forked child does until it ends; it never returns to the test."""
    code = 1
    try:
        os.environ |= environment
        signal.alarm(240)
        torch.set_num_threads(1)  # after a fork torch remakes its pool, and trips where two threads ask first
        gc.freeze()  # what the test has imported is nothing to look through between two stages
        out = os.open(root / f"rank-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        # pytest's own write elsewhere; a rank that is forked from a rank must not close what it replaces
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if plant:
            plant(rank)
        cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):  # a child that came back from here would run the tests once more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def at_step(number: int, act: Callable[[], object], rank: int = 0) -> Plant:
    """Have one rank do something when it begins its `number`-th optimizer step, counted from 1."""

    def plant(own: int) -> None:
        begun, step = 0, learner.Learner.step

        def watched(self: learner.Learner, index: int) -> float:
            nonlocal begun
            begun += 1
            if begun == number:
                act()
            return step(self, index)

        if own == rank:
            learner.Learner.step = watched

    return plant


def signal_at(number: int, which: signal.Signals, rank: int = 0) -> Plant:
    """Have one rank send itself a signal when it begins its `number`-th step."""
    return at_step(number, lambda: os.kill(os.getpid(), which), rank)


def said(root: Path, rank: int = 0) -> str:
    """What a rank printed."""
    return (root / f"rank-{rank}.out").read_text()


def write_boundaries(root: Path, rank: int) -> None:
    """Have a rank write down the digest of every tensor after each stage, a line each, in `root/boundaries-<n>`."""
    leave = learner.Learner.leave

    def written(self: learner.Learner) -> None:
        leave(self)
        with (root / f"boundaries-{rank}").open("a") as file:
            file.write(json.dumps(digests(self.model)) + "\n")

    learner.Learner.leave = written


def weights(root: Path) -> dict[str, torch.Tensor]:
    """The saved model's."""
    return load_file(folder(root) / "model/model.safetensors")


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(root: Path) -> list[dict[str, Any]]:
    """What the records say of the training: every event but those of starting and of going on, without times."""
    lines = (folder(root) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in event.items() if key not in TIMED}
        for event in map(json.loads, lines)
        if event["event"] not in ("started", "note", "finished")
        and not (event["event"] == "stage_started" and event["step"])
    ]


def steps(root: Path) -> range:
    """The numbers of the optimizer steps of a whole run, over all its stages, from 1."""
    taken = [event["step"] for event in history(root) if event["event"] == "stage_ended"]
    return range(1, sum(taken) + 1)
