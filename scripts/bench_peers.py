"""What the same staged fine-tuning costs here and elsewhere: against `Trainer`, finetuning-scheduler, and our own loop.

    python scripts/bench_peers.py [SCENARIO ...] [--rows 600] [--rounds 3] [--epochs 5] [--pictures FOLDER]

Every contestant works in a process and on one thread of its own; they take turns, and the order turns around with each
round. Compared is CPU time, which a busy machine disturbs least: of training alone (capture, checks, checkpoints and
evaluations included) and of the whole process, imports included. A ratio is taken within a round. Results are added to
build/bench/results.jsonl as they come; `--table` only shows what that holds. finetuning-scheduler and Lightning are
installed into build/peers, on top of the packages that are here already.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _scenarios
from _scenarios import BUILD, ROOT, Scenario

RESULTS = BUILD / "results.jsonl"
PEERS = ROOT / "build/peers"
WANTED = ("finetuning-scheduler==2.14.1", "lightning==2.6.6", "pytorch-lightning==2.6.6", "lightning-utilities==0.15.3")
METRICS = ("torchmetrics==1.9.0",)
TITLES = {
    "cached": "Frostline",
    "again": "Frostline, second run",
    "constant": "Frostline, constant rates",
    "uncached": "Frostline, cache off",
    "trainer": "Trainer",
    "grouped": "Trainer, grouped by length",
    "scheduler": "finetuning-scheduler",
}
Record = dict[str, Any]


def against(scenario: Scenario) -> list[str]:
    """Who does a scenario, ours first: its second run needs what the first one keeps."""
    if len(scenario.phases) > 1:
        return ["cached", "constant", "uncached", "trainer", "scheduler"]
    return ["cached", "again", "uncached", "trainer"] + (["grouped"] if scenario.text else [])


def peers() -> Path:
    """The Python of the peers' own environment, made where it is missing; it sees the packages of this one."""
    python = PEERS / "bin/python"
    if not python.exists():
        shutil.rmtree(PEERS, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(PEERS)], check=True)
        (site,) = PEERS.glob("lib/python*/site-packages")
        (site / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *WANTED, *METRICS], check=True)
    return python


def turn(scenario: Scenario, contestant: str, data: Path, epochs: int, folder: Path) -> Record:
    """One contestant's result, with the CPU and wall time of its whole process. Ends where it fails."""
    python = str(peers()) if contestant == "scheduler" else sys.executable
    program = str(Path(__file__).with_name("_contestants.py"))
    words = [contestant, scenario.name, str(data), str(epochs), str(folder)]
    began, log = time.perf_counter(), folder / f"{contestant}.log"
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as out:
        child = subprocess.Popen(
            [python, program, *words], stdout=out, stderr=subprocess.STDOUT, env=os.environ | quiet
        )
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    lines = log.read_text().splitlines()
    if child.returncode:
        raise SystemExit("\n".join([*lines[-15:], f"{contestant} failed at `{scenario.name}`"]))
    spent = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - began}
    return {"scenario": scenario.name, "contestant": contestant, **json.loads(lines[-1]), **spent}


def rounds(scenario: Scenario, data: Path, epochs: int, count: int) -> Iterator[Record]:
    """Every contestant `count` times, in turns; all must train numbers of the same count."""
    for number in range(count):
        order = against(scenario)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            sizes = set()
            for contestant in order if number % 2 == 0 else _turned(order):
                record = turn(scenario, contestant, data, epochs, Path(folder))
                sizes.add(tuple(record["sizes"]))
                yield {**record, "round": f"{os.getpid()}-{number}", "epochs": epochs}
            if len(sizes) > 1:
                raise SystemExit(f"`{scenario.name}`: not everyone trained the same: {sizes}")


def _turned(order: list[str]) -> list[str]:
    """The order from behind, but for a second run, which comes after the first."""
    turned = [each for each in reversed(order) if each != "again"]
    return turned + [each for each in order if each == "again"]


# Tables


def table(records: Sequence[Record], epochs: int, markdown: bool) -> str:
    """A line for each scenario and contestant: medians, and the ratios to ours as min-median-max."""
    head = ["", "", "training", "process", "wall", "accuracy", "to ours: training", "to ours: process", "rounds"]
    body = []
    for scenario in _scenarios.scenarios(epochs).values():
        some = [each for each in records if each["scenario"] == scenario.name]
        for place, contestant in enumerate(name for name in TITLES if any(r["contestant"] == name for r in some)):
            body.append([scenario.title if place == 0 else "", *_line(some, contestant)])
    rows = [head, *body]
    if markdown:
        rows.insert(1, ["---", "---", *["--:"] * (len(head) - 2)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    return "\n".join("  ".join(map(_placed, row, widths, range(len(head)))).rstrip() for row in rows)


def _placed(cell: str, width: int, place: int) -> str:
    return cell.ljust(width) if place < 2 else cell.rjust(width)


def _line(records: Sequence[Record], contestant: str) -> list[str]:
    own = [each for each in records if each["contestant"] == contestant]

    def median(key: str) -> float:
        return statistics.median(each[key] for each in own)

    seconds = [f"{median(key):.1f} s" for key in ("train_cpu", "cpu", "train_wall")]
    ratios = [_ratio(records, own, key) if contestant != "cached" else "" for key in ("train_cpu", "cpu")]
    return [TITLES[contestant], *seconds, f"{median('accuracy'):.3f}", *ratios, str(len(own))]


def _ratio(records: Sequence[Record], own: Sequence[Record], key: str) -> str:
    ours = {each["round"]: each[key] for each in records if each["contestant"] == "cached"}
    found = sorted(each[key] / ours[each["round"]] for each in own if each["round"] in ours)
    if not found:
        return ""
    return f"{found[0]:.2f}-{statistics.median(found):.2f}-{found[-1]:.2f}"


def _known(rows: int, epochs: int) -> list[Record]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [each for each in map(json.loads, lines) if each["rows"] == rows and each["epochs"] == epochs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(_scenarios.scenarios(1)))
    parser.add_argument("--rows", type=int, default=600, help="rows to train on; a quarter of that is judged")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of the scenarios with one stage")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="pictures by class, in place of the digits")
    parser.add_argument("--quick", action="store_true", help="one round of 200 rows and two epochs: does it work")
    parser.add_argument("--table", action="store_true", help="only show what was measured before")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        asked.rows, asked.rounds, asked.epochs = 200, 1, 2
    every = _scenarios.scenarios(asked.epochs)
    if unknown := set(asked.scenarios) - set(every):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    for name in () if asked.table else asked.scenarios or every:
        data = _scenarios.prepare(every[name], asked.rows, asked.pictures)
        for record in rounds(every[name], data, asked.epochs, asked.rounds):
            record["rows"] = asked.rows
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{name:12} {record['contestant']:10} training {record['train_cpu']:7.1f} s CPU", flush=True)
    print(table(_known(asked.rows, asked.epochs), asked.epochs, asked.markdown))


if __name__ == "__main__":
    main()
