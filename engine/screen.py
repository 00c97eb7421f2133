"""What a user sees while things happen: the plan as a picture, a run as it goes. It shows values; it computes none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import astuple, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from ruamel.yaml import YAML

from engine.errors import REFUSED, RunError
from engine.grammar.source import clean
from engine.listing import Entry
from engine.outline import Outline
from engine.plan import Plan
from engine.planning.openings import entries as stage_entries
from engine.recipe import Recipe
from engine.records import Evaluated, Event, Finished, Note, Proved, StageEnded, StageStarted, Started, Step
from engine.reporting.picture import INKS, MARKS, WORDS, count, duration, picture, save, tables, weight
from engine.sweeping.curve import Swept, Tried

if TYPE_CHECKING:
    from engine.store import Kept


def console() -> Console:
    """Standard output; wide where nobody's window limits it."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_json(plan: Plan) -> None:
    """The plan as JSON on standard output."""
    print(json.dumps(plan.json(), indent=1))


def print_stages(recipe: Recipe, outline: Outline) -> None:
    """The recipe's stages as the YAML list that a schedule generates, to be pasted and changed."""
    entries = [entry.model_dump(exclude_defaults=True, mode="json") for entry, _ in stage_entries(recipe, outline)]
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.width = 120
    yaml.dump({"stages": [{"name": entry.pop("name"), **entry} for entry in entries]}, sys.stdout)


def show_plan(console: Console, name: str, plan: Plan, notes: Iterable[str] = ()) -> None:
    """The plan: layers against stages, the head on top, the numbers of each stage below, and notes on what it costs."""
    drawn = picture(plan.json(), folded=True)
    name, size = _told(name), f"{_told(plan.architecture)}, {count(plan.size)} parameters"
    console.print(f"[bold]{name}[/]  {size}, {plan.examples:,} examples, {plan.batch_size} a step\n", highlight=False)
    for table in tables(drawn, console.width):
        console.print(table, highlight=False)
    console.print(
        "  ".join(f"[{INKS[kind]}]{MARKS[kind] * 2}[/] {WORDS[kind]}" for kind in drawn.kinds), highlight=False
    )
    console.print(
        "[dim]The work of a step is counted in FLOPs; 100% is a step that trains everything.[/]", highlight=False
    )
    sizes = plan.sizes
    lengths = f" of {sizes.mean:.0f} tokens on average and {sizes.longest} at most" if sizes.longest else ""
    counted = "as the data have them" if sizes.known else "as assumed, for nobody has looked at the data"
    console.print(
        f"[dim]Memory, disk and time are for {sizes.train + sizes.validation:,} rows{lengths}, {counted}; on one "
        "device. Memory comes on top of what the process takes by itself.[/]",
        highlight=False,
    )
    for note in notes:
        console.print(f"[yellow]note[/]  {escape(clean(note))}", highlight=False, soft_wrap=True)
    if not plan.measured:
        console.print(
            "[yellow]order and cost of the modules are guessed from their sizes: this model can't be traced[/]"
        )


def draw_plan(plan: Plan, path: Path, dark: bool) -> None:
    """The plan as an SVG or PNG file; raises `RunError` where the file's ending is neither."""
    if path.suffix not in (".svg", ".png"):
        raise RunError(f"{path} is no picture's name: it ends in neither .svg nor .png", REFUSED)
    save(plan.json(), path, dark)


def show_entries(console: Console, entries: Iterable[Entry]) -> None:
    """Recipes and runs as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("recipe", "about", "run", "state", "result", "time"):
        table.add_column(title)
    for entry in entries:
        table.add_row(*(escape(clean(part)) for part in astuple(entry)))
    console.print(table if table.row_count else "There are no recipes and no runs here.", highlight=False)


def show_kept(console: Console, folder: Path, kept: Iterable[Kept], total: int) -> None:
    """The activations that runs have kept, as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("model", "kept at", "rows", "type", "size"):
        table.add_column(title, justify="right" if title in ("rows", "size") else "left")
    table.add_column("last used")
    for one in kept:
        used = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        words = (one.about or "not written down", ", ".join(one.cuts), f"{one.rows:,}", one.dtype, weight(one.size))
        table.add_row(*(escape(clean(word)) for word in (*words, used)))
    if table.row_count:
        console.print(table, highlight=False)
    console.print(f"{escape(str(folder))} takes {weight(total)}.", highlight=False, soft_wrap=True)


def follow(console: Console, events: Iterable[Event]) -> Event | None:
    """Show events as they come, and return the last. Bars move only on a terminal; elsewhere each record is a line."""
    last: Event | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[loss]}"), console=console, disable=not console.is_terminal
    ) as bars:
        task: TaskID | None = None
        for last in events:
            if isinstance(last, StageStarted):
                task = bars.add_task(_told(last.stage), total=last.steps, loss="")
            elif isinstance(last, Step) and task is not None:
                bars.update(task, completed=last.step, loss=f"loss {last.loss:.4f}")
            if not (isinstance(last, Step) and console.is_terminal):
                console.print(line(last), highlight=False, soft_wrap=True)
    return last


def follow_sweep(console: Console, events: Iterable[Event]) -> None:
    """Show each run of a sweep as it ends, and the curve in the end."""
    for event in events:
        if isinstance(event, Tried):
            told = _told(" ".join(filter(None, (event.point, event.variant, f"seed {event.seed}"))))
            came = f"[red]{_told(event.failed)}[/]" if event.failed else f"{event.metric} [green]{event.value:.4f}[/]"
            when = "done before" if event.known else f"{event.seconds:.1f} s"
            console.print(f"{told}  {came}  [dim]{when}[/]", highlight=False, soft_wrap=True)
        elif isinstance(event, Swept):
            show_curve(console, event)
        elif not isinstance(event, Step):
            console.print(line(event), highlight=False, soft_wrap=True)


def show_curve(console: Console, swept: Swept) -> None:
    """The points of a sweep as a table, then what was selected and where all of it lies."""
    curve = swept.curve
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (
        "",
        "point",
        "trains",
        "tuned to",
        f"{curve.metric}, validation",
        "steps",
        "time",
        "a step",
        "memory",
    ):
        table.add_column(title, justify="left" if title in ("", "point", "tuned to") else "right")
    for row in curve.rows:
        mark = "[green]*[/]" if row.within else ""
        style = "bold" if curve.chosen and row.point == curve.chosen.point else ""
        if row.mean is None:
            table.add_row("", _told(row.point), count(row.size), "-", f"[red]{_told(row.failed)}[/]")
            continue
        half = "" if row.half is None else f" ± {row.half:.3f}"
        numbers = (f"{row.mean:.4f}{half}", f"{row.steps:,}", duration(row.seconds), duration(row.step_seconds))
        cells = (_told(row.point), count(row.size), _told(row.variant), *numbers, weight(row.peak_bytes))
        table.add_row(mark, *cells, style=style)
    console.print(table, highlight=False)
    console.print("[green]*[/] [dim]within one standard error of the best; ± is a 95% interval over seeds[/]")
    if curve.chosen:
        tested = "".join(f"; {name} {value:.4f} on test" for name, value in swept.test.items() if name == curve.metric)
        console.print(f"[bold]selected[/]  {_told(curve.chosen.point)}{tested}: {swept.recipe}", soft_wrap=True)
    console.print(f"[bold]page[/]  {swept.page}", highlight=False, soft_wrap=True)


def _told(value: Any) -> Any:
    """A value of an event with all text in it made safe: a label may look like rich's markup, or drive a terminal."""
    if isinstance(value, str):
        return escape(clean(value))
    if isinstance(value, Mapping):
        return {_told(key): _told(part) for key, part in value.items()}
    return tuple(map(_told, value)) if isinstance(value, tuple) else value


def line(event: Event) -> str:
    """An event as one line of rich's markup."""
    event = replace(event, **{part.name: _told(getattr(event, part.name)) for part in fields(event)})
    match event:
        case Started():
            return f"[bold]{event.recipe}[/] on {event.processes} x {event.device}; {event.batch}"
        case Note():
            return f"[dim]note[/]  {event.sentence}"
        case StageStarted():
            carried = f", {event.carried} moments carried over" if event.carried else ""
            after = f", {event.step:,} of them done before" if event.step else ""
            trains = f"{count(event.size)} parameters train for {event.steps:,} steps{after}{carried}"
            return f"[bold cyan]{event.stage}[/]  {trains}; {event.frozen}"
        case Step():
            rates = sorted(set(event.rates), reverse=True)
            rate = f"{rates[0]:.2e}" + (f" to {rates[-1]:.2e}" if len(rates) > 1 else "")
            return f"{event.stage}  {event.step}/{event.steps}  loss {event.loss:.4f}  rate {rate}"
        case Evaluated():
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
            return f"{event.stage}  {event.step}  [green]{event.split}[/]  {metrics}{'  (best)' if event.best else ''}"
        case StageEnded():
            return f"{event.stage}  ended after {event.step} steps: {event.reason}; {event.seconds:.1f} s"
        case Proved():
            return f"[green]proved[/]  {event.moved} tensors trained and moved, {event.still} frozen ones are bit-equal"
        case Finished():
            return f"[bold]saved[/]  {event.model}  ({event.seconds:.1f} s)"
        case _:
            return str(event)
