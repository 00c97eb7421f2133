"""Schedules of finetuning-scheduler (FTS): phases that thaw more and more of a LightningModule.

A phase opens the parameters that it names, by name or by a regular expression from the start of a name, and all that
came before stays open (`finetuning_scheduler.fts_supporters`). Names begin with the attribute that holds the model.
A schedule names neither model nor data nor how long its last phase lasts: the command line and remarks say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from engine.grammar.reading import Node
from engine.importing import parameters
from engine.importing.base import Draft, Given, Tool, override
from engine.importing.config import Config
from engine.importing.parameters import EVERYTHING, Translated, fold

LONGEST = 10
"""Epochs of a phase that only early stopping ends."""
PATIENCE = 3
"""FTS's early stopping by default: `val_loss`, three evaluations without a gain."""
BASE_RATE = 1e-5
"""FTS's `base_max_lr` by default: the rate of what a phase opens, where it has none of its own."""
ELSEWHERE = "a stage has its own fresh optimizer and rate: `learning_rate`, `lr_scheduler_type`, `training.optim`"


class FinetuningScheduler(Tool):
    """https://github.com/speediedan/finetuning-scheduler"""

    name = "finetuning-scheduler"

    def knows(self, config: Config) -> bool:
        keys = config.root.value
        return _callback(config) or (bool(keys) and all(key.isdecimal() for key in keys))

    def read(self, config: Config, given: Given) -> Draft:
        if _callback(config):
            config.refuse("trainer", "this is Lightning's own config", "import the file that `ft_schedule` names")
        missing = [f"`--{name}`" for name in ("model", "task", "data") if not getattr(given, name)]
        if missing:
            config.refuse("0", "a schedule names no model, task or data", f"give {' and '.join(missing)}")
        draft = Draft(freeze=[EVERYTHING], training={"learning_rate": BASE_RATE, "lr_scheduler_type": "constant"})
        phases = [(key, config.root.value[key]) for key in sorted(config.root.value, key=int)]
        holder = _holder([str(item.value) for _, phase in phases for item in _params(phase)])
        if holder:
            what = f"`{holder}.` is where the LightningModule keeps its model; patterns begin inside of it"
            config.note("0", what)
        rates: dict[str, float] = {}
        before = 0
        for key, phase in phases:
            config.take(key)
            stage, before = _stage(config, key, phase, before, holder)
            _rates(config, key, phase, stage, rates)
            draft.stages.append(stage)
        draft.remarks["training"] = "How rates fell, and by which optimizer, was the LightningModule's own."
        draft.remarks["stages"] = f"Where a phase named no last epoch it has {LONGEST}, or fewer by early stopping."
        override(draft, given)
        return draft


def _callback(config: Config) -> bool:
    return "ft_schedule" in str(config.root.plain().get("trainer", ""))


def _params(phase: Node) -> list[Node]:
    listed = phase.value.get("params") if isinstance(phase.value, dict) else None
    return listed.value if listed and isinstance(listed.value, list) else []


def _holder(names: list[str]) -> str:
    """The first segment of all names, where it is the same plain word in each."""
    firsts = {re.split(r"\\?\.", name.removeprefix("^"), maxsplit=1)[0] for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return first if first.isidentifier() else ""


def _stage(config: Config, key: str, phase: Node, before: int, holder: str) -> tuple[dict[str, Any], int]:
    """A phase as a stage, and the epoch it ends at the latest."""
    said = phase.plain() if isinstance(phase.value, dict) else {}
    patterns = fold(_patterns(config, key, phase, holder))
    stage: dict[str, Any] = {"name": f"phase-{key}", "unfreeze": patterns}
    last = said.get("max_transition_epoch", -1)
    if isinstance(last, int) and last >= 0:
        stage["epochs"] = max(1, last - before)
        before = max(before, last)
    else:
        stage["epochs"] = LONGEST
    stage["early_stopping"] = {"metric": "loss", "patience": PATIENCE}
    for name in said:
        if name in ("new_lr_scheduler", "new_optimizer"):
            config.note(key, f"`{name}`: {ELSEWHERE}", phase.keys[name])
        elif name not in ("params", "lr", "max_transition_epoch"):
            config.note(key, f"`{name}` is no key of a phase, and FTS does nothing by it", phase.keys[name])
    return stage, before


def _rates(config: Config, key: str, phase: Node, stage: dict[str, Any], rates: dict[str, float]) -> None:
    """What a phase opens at a rate of its own learns at it, and goes on to."""
    said = phase.value.get("lr") if isinstance(phase.value, dict) else None
    if key == "0":
        what = "the first phase learns at the optimizer's own rate; write it into the stage"
        config.note(key, f"`lr`: {what}" if said else what, said.place if said else None)
    elif said:
        rates |= dict.fromkeys(stage["unfreeze"], float(said.value))
    if rates:
        stage["learning_rate"] = dict(rates)


def _patterns(config: Config, key: str, phase: Node, holder: str) -> Iterator[str]:
    items = _params(phase)
    names = {str(item.value) for item in items}
    for item in items:
        text = str(item.value)
        inner = re.sub(rf"^\^?{re.escape(holder)}\\?\.", "", text) if holder else text
        twin = re.sub(r"\.(weight|bias)$", lambda found: ".bias" if found[1] == "weight" else ".weight", text)
        for translated in _translated(inner, twin != text and twin in names):
            if translated.remark:
                config.note(key, f"`{text}`: {translated.remark}", item.place)
            if translated.pattern:
                yield translated.pattern


def _translated(text: str, both: bool) -> tuple[Translated, ...]:
    """One entry; where a module's weight and bias are both listed, together they are the module."""
    if both:
        return (Translated(parameters.of_prefix(re.sub(r"(weight|bias)$", "", text)).pattern),)
    try:
        return parameters.of_regex(text, "match")
    except ValueError as error:
        return (Translated(None, str(error)),)
