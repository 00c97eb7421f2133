"""What a sweep over freeze depth costs on one shared cache, and what the same runs cost without it, side by side.

    python scripts/bench_sweep.py [--rows 300] [--seeds 3] [--depths 0,1,2,3,4,5,6]

MiniLM (6 blocks) on TREC questions by recipes/trec.yaml, one learning rate, the same steps at every depth. Each sweep
is a process and a thread of its own, and both run at the same time; compared is the CPU time of the whole process,
imports included, which a busy machine disturbs least. Both must come to the same numbers, bit for bit.
`forecast` is what the plans count in FLOPs: the most that a cache could spare, were everything but the layers free.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _trec

ROOT = Path(__file__).parent.parent
WAYS = {"shared cache": "cache=auto", "cache: off": "cache=off"}


@dataclass(frozen=True)
class Spent:
    """What one sweep took and came to."""

    cpu: float
    flops: float
    rows: list[dict[str, Any]]


def begin(way: str, words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start one sweep in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "engine.cli",
        "sweep",
        "recipes/trec.yaml",
        WAYS[way],
        *words,
        "--runs",
        str(folder),
    ]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | quiet)


def end(way: str, child: subprocess.Popen[bytes], folder: Path) -> Spent:
    """What a sweep took and came to, once it is over; ends where it has failed."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"`{way}` failed:\n" + (folder / "log").read_text()[-2000:])
    rows = json.loads((folder / "trec-sweep/sweep.json").read_text())["rows"]
    flops = sum(row["flops"] * len(row["values"]) for row in rows)
    return Spent(usage.ru_utime + usage.ru_stime, flops, rows)


def table(cached: Spent, plain: Spent) -> str:
    lines = [f"{'':14}{'accuracy':>18}{'a run, cached':>16}{'a run, off':>14}{'ratio':>8}"]
    for one, other in zip(cached.rows, plain.rows, strict=True):
        told = f"{one['mean']:.3f} ± {one['interval'] or 0:.3f}"
        times = f"{one['seconds']:>14.1f} s{other['seconds']:>12.1f} s{one['seconds'] / other['seconds']:>8.0%}"
        lines.append(f"{one['point']:14}{told:>18}{times}")
    same = all(one["values"] == other["values"] for one, other in zip(cached.rows, plain.rows, strict=True))
    forecast = f"; forecast {cached.flops / plain.flops:.0%}" if plain.flops else ""
    return "\n".join(
        [
            *lines,
            f"CPU time: {cached.cpu:.0f} s on a shared cache, {plain.cpu:.0f} s without: {cached.cpu / plain.cpu:.0%}"
            f"{forecast}",
            f"every value of every run is {'the same' if same else 'NOT the same'} with and without",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300, help="rows to train on; half as many judge")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depths", default="0,1,2,3,4,5,6")
    parser.add_argument("--model", default="", help="MiniLM's folder, where its package is not installed")
    asked = parser.parse_args()
    _trec.prepare(ROOT / "data/trec")
    splits = [f"data.splits.train=train[:{asked.rows}]", f"data.splits.validation=validation[:{asked.rows // 2}]"]
    options = ["--depths", asked.depths, "--seeds", str(asked.seeds), "--learning-rates", "2e-4"]
    with ExitStack() as held:
        folders = {way: Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) for way in WAYS}
        words = [*splits, "data.splits.test=", *([f"model={asked.model}"] if asked.model else []), *options]
        children = {way: begin(way, words, folder) for way, folder in folders.items()}
        spent = [end(way, children[way], folders[way]) for way in WAYS]
        print(table(*spent))


if __name__ == "__main__":
    main()
