"""`frostline selftest advise`: cases whose answer is known, and regret against every candidate trained in full.

Each case is a process of its own that adds one JSON line to a file as soon as it is done, so that whatever ends the
program, what is done stays; the same command does what is missing. The table comes from those lines alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.advising import planting, scorecard
from engine.advising.planting import INPUT, SHIFTS
from engine.errors import REFUSED, RunError

KINDS = ("plant", "shift", "advice", "truth")
ROWS, TEST = 400, 500
"""Rows of a user, and rows that the truth is measured on."""
BATCH, EPOCHS, RATE = 16, 4.0, 2e-4
SMALL_RATE, SMALL_EPOCHS = 1e-3, 8.0
PICTURES = {"digits-resnet": ("resnet", "invert"), "digits-vit": ("vit", "mix")}
"""Sets of pictures that are made here: a small model, and the shift it meets."""


ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
"""What a case's process is told: one thread, no network, no GPU."""


@dataclass(frozen=True)
class Settings:
    """What all cases share."""

    work: Path
    """The folder of everything that is made, and the data root of every case."""
    model: str
    trec: Path
    sets: Mapping[str, Path]
    budget: str = "150s"
    draws: int = 3
    strength: float = 2.0
    rows: int = ROWS
    seeds: int = 3


def cases(kinds: Sequence[str], settings: Settings, blocks: int = 6) -> list[str]:
    """The names of all cases of some kinds, the longest first."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise RunError(f"`--cases {unknown[0]}` is none of {', '.join(KINDS)}", REFUSED)
    names = [*settings.sets, *PICTURES]
    found = {
        "truth": [f"truth:{name}:{seed}" for name in names for seed in range(settings.seeds)],
        "advice": [f"advice:{name}:{seed}" for name in names for seed in range(settings.seeds)],
        "plant": [
            f"plant:{block}:{draw}:{settings.strength:g}" for draw in range(settings.draws) for block in range(blocks)
        ],
        "shift": [
            f"shift:{kind}:{shift}:{draw}" for kind in ("resnet", "vit") for shift in SHIFTS for draw in range(2)
        ],
    }
    return [case for kind in KINDS[::-1] if kind in kinds for case in found[kind]]


def prepare(settings: Settings, kinds: Sequence[str]) -> None:
    """What several cases need: the model that has learnt TREC, and small ones that have learnt digits."""
    settings.work.mkdir(parents=True, exist_ok=True)
    if "plant" in kinds:
        tune(settings)
    if set(kinds) - {"plant"}:
        for kind in ("resnet", "vit"):
            planting.pretrained(kind, settings.work / kind)


def tune(settings: Settings) -> Path:
    """The model fine-tuned on TREC's training rows, all of it; made once."""
    done = settings.work / "tuned"
    if done.exists():
        return done
    place = settings.work / "tuning"
    planting.write_rows(place / "train.jsonl", planting.rows(settings.trec / "train.jsonl"))
    recipe = planting.text_recipe(settings.model, "tuning/train.jsonl", 32, 4.0, RATE, 0)
    recipe["training"] = {"warmup_steps": 0.1}
    file = planting.write_recipe(place / "tuned.json.yaml", recipe)
    command = [
        sys.executable,
        "-m",
        "engine.cli",
        "run",
        str(file),
        "--name",
        "tuned",
        "--data-root",
        str(settings.work),
    ]
    subprocess.run([*command, "--runs", str(place), "--fresh"], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(place / "tuned/model", done.with_name(".tuned"), dirs_exist_ok=True)
    done.with_name(".tuned").rename(done)
    return done


def named(text: str) -> tuple[str, Path]:
    """`name=FILE` as a pair. Raises `RunError` where it is none or the file is missing."""
    name, _, file = text.partition("=")
    if not file or not Path(file).is_file():
        raise RunError(f"`--sets {text}` names no file; write `name=FILE`, with a file of JSON lines", REFUSED)
    return name, Path(file)


def run(settings: Settings, kinds: Sequence[str], jobs: int, out: Path, only_report: bool = False) -> Iterator[str]:
    """Do the cases that have no line yet, and give the table of all lines; a sentence for each case as it ends."""
    if not only_report:
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = _inside(settings)
        wanted = cases(kinds, settings)
        yield f"{len(wanted)} cases, {jobs} at a time, into {out}"
        prepare(settings, kinds)
        yield from run_all(wanted, settings, jobs, out)
    yield from scorecard.report(lines(out))


def _inside(settings: Settings) -> Settings:
    """The same with a model that lies in some folder copied below the data root, where recipes may name it."""
    base = settings.work / "base"
    if not Path(settings.model).is_dir():
        return settings
    if not base.exists():
        shutil.copytree(settings.model, base)
    return replace(settings, model="base")


def run_all(wanted: Sequence[str], settings: Settings, jobs: int, out: Path) -> Iterator[str]:
    """Every case that has no line yet, so many at a time; a sentence for each as it ends."""
    done = {line["case"] for line in lines(out) if "error" not in line}
    left = [case for case in wanted if case not in done]
    with ThreadPoolExecutor(jobs) as pool:
        for number, said in enumerate(pool.map(lambda case: _process(case, settings, out), left), 1):
            yield f"{number} of {len(left)}  {said}"


def _process(case: str, settings: Settings, out: Path) -> str:
    began = time.perf_counter()
    asked = json.dumps({**vars(settings), "sets": {k: str(v) for k, v in settings.sets.items()}}, default=str)
    command = [sys.executable, "-m", "engine.selftest", case, asked, str(out.resolve())]
    ended = subprocess.run(command, env={**os.environ, **ALONE}, capture_output=True, text=True, cwd=os.getcwd())
    last = (ended.stdout if not ended.returncode else ended.stderr).strip().splitlines()[-1:] or ["nothing was said"]
    if ended.returncode:
        add(out, {"case": case, "error": last[0]})
    return f"{case}: {last[0]}  ({time.perf_counter() - began:.0f} s)"


def add(out: Path, line: Mapping[str, Any]) -> None:
    """Add a line in one write, which no other process's can come into."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines so far; the last one of each case counts."""
    if not out.exists():
        return []
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({line["case"]: line for line in found}.values())


# One case


def one(case: str, settings: Settings) -> dict[str, Any]:
    """Measure one case: what comes out is its line."""
    import torch

    torch.set_num_threads(1)
    kind, *words = case.split(":")
    began, cpu = time.perf_counter(), time.process_time()
    place = settings.work / "cases" / case.replace(":", "-")
    shutil.rmtree(place, ignore_errors=True)
    made: dict[str, Callable[..., dict[str, Any]]] = {
        "plant": _plant,
        "shift": _shift,
        "advice": _advice,
        "truth": _truth,
    }
    try:
        found = made[kind](place, settings, *words)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "case": case,
        "kind": kind,
        **found,
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
    }


def _plant(place: Path, settings: Settings, block: str, draw: str, strength: str) -> dict[str, Any]:
    planting.damaged(settings.work / "tuned", int(block), float(strength), int(draw), place / "model")
    found = planting.drawn(planting.rows(settings.trec / "test.jsonl"), settings.rows, "plant", draw)
    planting.write_rows(place / "rows.jsonl", found)
    inside = place.relative_to(settings.work)
    recipe = planting.text_recipe(str(inside / "model"), str(inside / "rows.jsonl"), BATCH, EPOCHS, RATE, int(draw))
    told = _ranked(place, recipe, settings, int(draw))
    return {"right": [f"block {block}"], "strength": float(strength), **told}


def _shift(place: Path, settings: Settings, kind: str, shift: str, draw: str) -> dict[str, Any]:
    planting.shifted(shift, 200, int(draw), place / "rows/train")
    inside = place.relative_to(settings.work)
    recipe = planting.picture_recipe(kind, str(inside / "rows"), BATCH, SMALL_EPOCHS, SMALL_RATE, int(draw))
    told = _ranked(place, recipe, settings, int(draw))
    right = ["embeddings", "block 0"] if shift in INPUT else [told["last"], "head"]
    return {"right": right, "shift": shift, **told}


def _ranked(place: Path, recipe: dict[str, Any], settings: Settings, seed: int) -> dict[str, Any]:
    """The ladder up to short runs, over single units alone."""
    from engine.advising.answers import value
    from engine.advising.units import EVERYTHING

    ladder = _ladder(place, recipe, settings, seed)
    single = {name: each for name, each in ladder.bench.candidates.items() if len(each.units) < 2 or name == EVERYTHING}
    ladder.bench.candidates = single
    ladder.finalists = 0.0
    for _ in ladder.climb():
        pass
    advice = ladder.advice
    if not advice.ranking():
        raise RunError(f"a budget of {settings.budget} ends before the first short run", REFUSED)
    layers = list(advice.probes)
    drops = {b: advice.probes[a].accuracy - advice.probes[b].accuracy for a, b in pairwise(layers)}
    gains = _gains(advice)
    ranking = sorted([*advice.ranking(), "head"], key=lambda name: -gains.get(name, 0.0))
    return {
        "ranking": ranking,
        "units": advice.ranking(),
        "gains": gains,
        "scores": {name: sorted(told, key=lambda u: -told[u]) for name, told in advice.scores.items()},
        "drop": max(drops, key=lambda name: drops[name], default=None),
        "last": layers[-1] if layers else None,
        "folds": max((len(runs) for name, runs in advice.short.items() if name != "head"), default=0),
        "head_accuracy": value(advice.short["head"], ladder.metric).mean,
        "need": advice.verdict.need if advice.verdict else None,
        "chosen": advice.verdict.chosen if advice.verdict else None,
        "agreement": advice.agreement,
        "dropped": advice.dropped,
    }


def _gains(advice: Any) -> dict[str, float]:
    from engine.advising.answers import gains

    return {name: round(gain, 6) for name, gain in gains(advice.short).items()}


def _ladder(place: Path, recipe: dict[str, Any], settings: Settings, seed: int) -> Any:
    from engine.advising import ladder
    from engine.advising.budget import Budget, Clock

    clock, budget = Clock(now=time.process_time), Budget.read(settings.budget)
    return ladder.begin(_bench(place, recipe, settings, seed), "case", budget, clock, seed)


def _bench(place: Path, recipe: dict[str, Any], settings: Settings, seed: int, most: int = 10_000) -> Any:
    from accelerate import Accelerator

    from engine.advising import bench
    from engine.frost.prefix import Cache
    from engine.load import load

    loaded = load(planting.write_recipe(place / "case.yaml", recipe))
    cache = Cache(place / "activations", budget=round(20e9))
    return bench.gather(loaded.recipe, settings.work, cache, Accelerator(cpu=True), most, seed)


def _set(place: Path, settings: Settings, name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of a user, who has no test rows, and one that has them as its validation rows."""
    inside = place.relative_to(settings.work)
    if name in PICTURES:
        kind, shift = PICTURES[name]
        planting.shifted(shift, 300, 99, place / "user/train")
        planting.shifted(shift, 300, 99, place / "both/train")
        planting.shifted(shift, TEST, 99, place / "both/validation", skip=300)
        users = [
            planting.picture_recipe(kind, str(inside / which), BATCH, SMALL_EPOCHS, SMALL_RATE, seed)
            for which in ("user", "both")
        ]
        return users[0], users[1]
    found = planting.drawn(planting.rows(settings.sets[name]), settings.rows + TEST, "set", name)
    known = {row["label"] for row in found[: settings.rows]}
    planting.write_rows(place / "user.jsonl", found[: settings.rows])
    planting.write_rows(place / "test.jsonl", [row for row in found[settings.rows :] if row["label"] in known])
    user, test = str(inside / "user.jsonl"), str(inside / "test.jsonl")
    alone = planting.text_recipe(settings.model, user, BATCH, EPOCHS, RATE, seed)
    return alone, planting.text_recipe(settings.model, user, BATCH, EPOCHS, RATE, seed, validation=test)


def _advice(place: Path, settings: Settings, name: str, seed: str) -> dict[str, Any]:
    user, _ = _set(place, settings, name, int(seed))
    began = time.process_time()
    ladder = _ladder(place, user, settings, int(seed))
    for _ in ladder.climb():
        pass
    advice, verdict = ladder.advice, ladder.advice.verdict
    gain = verdict.gain
    return {
        "set": name,
        "seed": int(seed),
        "chosen": verdict.chosen,
        "best": verdict.best,
        "need": verdict.need,
        "decided_by": verdict.decided_by,
        "gain": None if gain is None else [gain.mean, gain.low, gain.high, gain.error],
        "thawed": _thawed(verdict),
        "rungs": {rung.name: round(rung.seconds, 1) for rung in advice.rungs},
        "dropped": advice.dropped,
        "spent": time.process_time() - began,
        "budget": settings.budget,
        "agreement": advice.agreement,
    }


def _thawed(verdict: Any) -> str | None:
    rows = [row for row in verdict.table if row.value and row.candidate.name != "head"]
    return max(rows, key=lambda row: (row.value.mean, -(row.short_loss or 0))).candidate.name if rows else None


def _truth(place: Path, settings: Settings, name: str, seed: str) -> dict[str, Any]:
    """Every candidate in full, at two rates, the better by validation rows; judged on rows that nobody chose by."""
    from engine.advising import trials
    from engine.advising.budget import Clock
    from engine.advising.units import HEAD, window

    _, both = _set(place, settings, name, int(seed))
    bench, clock = _bench(place, both, settings, int(seed)), Clock(now=time.process_time)
    mine = (place / "user.jsonl").read_text().count("\n") if name not in PICTURES else 300
    judge, test = trials.folds(bench.labels[:mine], 4, int(seed))[0], np.arange(mine, bench.rows)
    train = np.setdiff1d(np.arange(mine), judge)
    for pair in pairwise([unit.name for unit in bench.units if unit.name.startswith("block")][:-1]):
        bench.add(window(bench.units, pair))  # what advice may propose
    heads, head_rate = trials.fit_heads(bench, [(train, judge)], clock)
    found, began = {}, time.process_time()
    for each in bench.candidates.values():
        if each.name == HEAD:
            continue
        tried = []
        with trials.entered(bench, each, clock) as arm:
            for rate in (bench.rate, 3 * bench.rate):
                rows = np.concatenate([judge, test])
                steps = max(1, round(bench.steps * len(train) / bench.rows))
                run = trials.Run(train, rows, 0, int(seed), rate, rate, steps)
                tried.append((arm.run(run, heads[0].weights), rate))
        found[each.name] = _better(tried, len(judge), bench.labels[rows])
    with trials.entered(bench, bench.candidates[HEAD], clock) as arm:
        run = trials.Run(train, np.concatenate([judge, test]), 0, int(seed), head_rate, head_rate, 1)
        found[HEAD] = _better(
            [(arm.run(replace(run, steps=0), heads[0].weights), 0.0)], len(judge), bench.labels[run.judge]
        )
    work = {name: stage.cached_cost for name, stage in bench.stages.items()}
    return {"set": name, "seed": int(seed), "candidates": found, "work": work, "swept": time.process_time() - began}


def _better(tried: Sequence[tuple[Any, float]], judges: int, labels: np.ndarray) -> dict[str, Any]:
    """Of several rates the one that validation rows lose least at."""
    judged, rate = min(tried, key=lambda pair: float(pair[0].losses[:judges].mean()))
    right = judged.predicted == labels
    return {
        "rate": rate,
        "validation": float(right[:judges].mean()),
        "loss": float(judged.losses[:judges].mean()),
        "test": "".join("01"[int(each)] for each in right[judges:]),
        "seconds": sum(pair[0].seconds for pair in tried),
    }


if __name__ == "__main__":
    name, asked, file = sys.argv[1:4]
    given = json.loads(asked)
    given |= {"work": Path(given["work"]), "trec": Path(given["trec"])}
    given["sets"] = {key: Path(value) for key, value in given["sets"].items()}
    line = one(name, Settings(**given))
    add(Path(file), line)
    print(f"{line.get('chosen', '')} {line.get('ranking', [''])[0]}".strip() or "done")
