"""Advice -> a recipe that is ready to run: the user's own with its stages replaced, the evidence in its comments.

It is read back, checked and planned before anyone is told of it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import load, plan
from engine.advising import sayings
from engine.advising.advice import Advice
from engine.advising.bench import Bench
from engine.advising.units import EVERYTHING, HEAD
from engine.keeping import durable

WARM = 0.1


def write(advice: Advice, bench: Bench, resolved: Mapping[str, Any], to: Path) -> Path:
    """Write the recipe; raises `RecipeError` or `PlanError` where it would not run, which is a mistake of this file."""
    durable.replace(to, text(advice, bench, resolved, to.name).encode())
    plan.make(load.load(to).recipe, bench.outline, bench.rows)
    return to


def text(advice: Advice, bench: Bench, resolved: Mapping[str, Any], name: str) -> str:
    """The recipe as YAML."""
    from ruamel.yaml import YAML

    yaml, out = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(_recipe(advice, bench, resolved), out)
    return _comment(advice, name) + out.getvalue()


def _recipe(advice: Advice, bench: Bench, resolved: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in resolved.items() if key not in ("freeze", "stages", "adapters")}
    return {**kept, "freeze": ".*", "stages": _stages(advice, bench)}


def _stages(advice: Advice, bench: Bench) -> list[dict[str, Any]]:
    verdict = advice.verdict
    chosen = verdict.chosen if verdict else HEAD
    head = advice.head_rate or 1e-3
    fitted = advice.short.get(HEAD)
    shape = {"lr_scheduler_type": "linear", "warmup_steps": WARM}
    first = {"name": "head", "unfreeze": "@head", "steps": fitted[0].steps if fitted else 100, "learning_rate": head}
    if chosen == HEAD:
        return [{**first, **shape}]
    opens = [".*"] if chosen == EVERYTHING else list(bench.candidates[chosen].opens)
    row = sayings.row(verdict, chosen) if verdict else None
    rate = row.rate if row and row.rate else bench.rate
    epoch = -(-bench.rows * (advice.folds - 1) // advice.folds // bench.recipe.batch_size)
    second = {
        "name": "thaw",
        "unfreeze": opens[0] if len(opens) == 1 else opens,
        "epochs": round(advice.steps / epoch, 2),
        "learning_rate": rate,
    }
    return [{**first, **shape}, {**second, **shape}]


def _comment(advice: Advice, name: str) -> str:
    lines = [f"Made by `frostline advise` from {advice.recipe}. `frostline run {name}` trains it.", ""]
    for answer in sayings.answers(advice):
        lines += [f"{answer.question} {answer.short.capitalize()}.", *textwrap.wrap(answer.long, 114), ""]
    seconds = f"Spent {advice.spent:.0f} s of {advice.budget}"
    lines += [
        f"{seconds}; {advice.rows:,} rows in {advice.folds} folds, seed {advice.seed}, advice {advice.hash[:12]}."
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"
