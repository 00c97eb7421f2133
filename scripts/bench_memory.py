"""What a plan says of memory and time, held against what its stages took: one process for each recipe.

    python scripts/bench_memory.py [NAME or RECIPE.yaml ...] [--rows 400] [--list]

On a GPU the peak is what torch had allocated at most; on a CPU it is the resident memory above what the process took
before it loaded the model, libraries that are imported later included. The recipes known by name have one stage each,
so that no stage finds what another has left behind; of a recipe of your own each stage is told. Seconds are wall time
of the stage, over those that the plan foresaw from half a second's trial of the processor (`frostline plan`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _scenarios

TOP = {"minilm": "bert.encoder.layer", "vit": "vit.layers", "resnet": "resnet.encoder.stages"}
LORA = {"type": "lora", "target_modules": ["query", "value"], "r": 8}


def recipes(rows: int) -> dict[str, dict[str, Any]]:
    """Recipes by name: how much trains, of which network, replayed or not."""
    found: dict[str, dict[str, Any]] = {}
    for kind, depths in (("minilm", (0, 1, 3, 6)), ("vit", (0, 1, 6, 12)), ("resnet", (0, 1, 4))):
        for depth in depths:
            scenario = _scenarios.Scenario("", "", kind, (_scenarios.Phase(_scenarios.top(kind, depth), 2, 1e-4),))
            for cache in (True, False):
                found[f"{kind}-{depth}{'' if cache else '-off'}"] = _scenarios.recipe(
                    scenario, _scenarios.prepare(scenario, rows), cache
                )
    text = found["minilm-6-off"]
    found["minilm-all"] = text | {"freeze": [], "stages": [{"name": "all", "epochs": 2}]}
    found["minilm-micro"] = found["minilm-all"] | {"per_device_batch_size": 8}
    found["minilm-lora"] = text | {"adapters": [LORA]}
    found["minilm-words"] = found["minilm-all"] | {"task": "fill-mask", "evaluation": "loss"}
    return found


def child(path: Path, folder: Path) -> None:
    """Run a recipe and print, for each stage, what was foreseen and what was taken."""
    import torch
    import transformers

    from engine import start
    from engine.load import load
    from engine.records import StageEnded, Started

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    drafted = start.timed(start.draft(load(path), _scenarios.ROOT))
    foreseen = {stage.name: stage.forecast.seconds for stage in drafted.plan.stages}
    base, runs = 0, folder / "runs"
    for event in start.run(load(path), path.stem, _scenarios.ROOT, runs, fresh=True):
        if isinstance(event, Started):
            base = event.base_bytes
        if isinstance(event, StageEnded):
            plan = json.loads((runs / path.stem / "plan.json").read_text())
            stage = next(each for each in plan["stages"] if each["name"] == event.stage)
            told = stage["forecast"]["memory"]
            plan = told | {"total": told["total" if torch.cuda.is_available() else "process"]}
            took = {"stage": event.stage, "peak": event.peak_bytes - base, "seconds": event.seconds}
            print(json.dumps(took | {"plan": plan, "foreseen": foreseen[event.stage]}))


def stages(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """What a process of its own says of a recipe."""
    command = [sys.executable, __file__, "--child", str(path), str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if done.returncode:
        raise SystemExit(f"{path.stem} failed\n{done.stderr[-2000:]}")
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"'))


def line(name: str, found: dict[str, Any]) -> str:
    plan, took = found["plan"], found["peak"]
    parts = ("weights", "optimizer", "gradients", "best", "activations", "forward", "total")
    sizes = "".join(f"{plan[part] / 1e6:>12.1f}" for part in parts)
    time = f"{found['seconds']:>10.1f} s{found['foreseen']:>10.1f} s"
    return f"{name:18}{found['stage']:10}{sizes}{took / 1e6:>12.1f}{plan['total'] / took - 1:>+9.0%}{time}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--list", action="store_true", help="the recipes known by name")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    known = recipes(asked.rows)
    if asked.list:
        print("\n".join(known))
        return
    heads = ("weights", "optimizer", "gradients", "best", "activations", "forward", "plan, MB", "taken, MB")
    print(f"{'':28}{''.join(f'{head:>12}' for head in heads)}{'off by':>9}{'stage':>12}{'foreseen':>12}", flush=True)
    for name in asked.names or known:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = Path(name)
            if name in known:
                path = Path(folder) / f"{name}.yaml"
                path.write_text(json.dumps(known[name]))  # which is YAML as well
            for found in stages(path.resolve(), Path(folder)):
                print(line(path.stem, found), flush=True)


if __name__ == "__main__":
    main()
