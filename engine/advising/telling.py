"""Advice as a terminal shows it: each rung as it is done, then the five answers, the picture and the table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from engine.advising import sayings
from engine.advising.advice import Advice, Rung
from engine.advising.answers import gains
from engine.grammar.source import clean
from engine.reporting.picture import count, duration

BLOCKS = " ▏▎▍▌▋▊▉█"
BAR = 24
"""Letters of the longest bar."""


def follow(console: Console, events: Iterable[Rung | Advice], folder: Path) -> Advice | None:
    """Show rungs as they come and the advice at the end; returns the advice."""
    advice = None
    for event in events:
        if isinstance(event, Advice):
            advice = event
            show(console, event, folder)
        else:
            console.print(f"[bold]{event.name}[/]  [dim]{duration(event.seconds)}[/]", highlight=False)
            for line in event.said:
                console.print(Padding(escape(clean(line)), (0, 0, 0, 2)), highlight=False)
    return advice


def show(console: Console, advice: Advice, folder: Path) -> None:
    """The advice as it stands."""
    console.print()
    for answer in sayings.answers(advice):
        console.print(f"[bold]{answer.question}[/]  [bold cyan]{escape(answer.short.upper())}[/]", highlight=False)
        console.print(Padding(escape(answer.long), (0, 0, 1, 2)), highlight=False)
    if advice.probes or len(advice.short) > 1:
        console.print(_picture(advice), highlight=False)
    if advice.verdict and len(advice.verdict.table) > 1:
        console.print(_table(advice), highlight=False)
    for line in advice.dropped:
        console.print(f"[yellow]dropped[/]  {escape(line)}", highlight=False)
    for line in advice.notes:
        console.print(f"[dim]{escape(clean(line))}[/]", highlight=False)
    console.print(f"[dim]Spent {advice.spent:.0f} s of {advice.budget}.[/]", highlight=False)
    if advice.verdict is None:
        console.print("There was no time to measure anything that answers; give it a larger --budget.")
        return
    console.print(
        f"{folder / 'advice.html'}\n{folder / f'{advice.recipe}.advised.yaml'}", highlight=False, soft_wrap=True
    )


def _picture(advice: Advice) -> Table:
    """Units from the top down: what a probe reads off each, and what training it alone gains."""
    found = gains(advice.short)
    most = max([found.get(unit.name, 0.0) for unit in advice.units], default=0.0)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("unit", "a probe reads", "training it alone gains (loss)"):
        table.add_column(title)
    for unit in reversed(advice.units):
        read, gain = advice.probes.get(unit.name), found.get(unit.name)
        probe = f"[blue]{bar(read.accuracy)}[/] {read.accuracy:.1%}" if read else ""
        drawn = "" if gain is None else f"[red]{bar(gain / most if most > 0 else 0)}[/] {gain:+.3f}"
        if probe or drawn:
            table.add_row(unit.name, probe, drawn)
    return table


def _table(advice: Advice) -> Table:
    verdict = advice.verdict
    assert verdict is not None
    table = Table(box=None, pad_edge=False, header_style="dim")
    titles = ("unfrozen", "trains", "work", "s/step", "rate", "loss, short", advice.metric, "gain, points", "near best")
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place in (0, 8) else "right")
    for row in verdict.table:
        chosen = row.candidate.name == verdict.chosen
        table.add_row(
            f"[bold]{row.candidate.name} <[/]" if chosen else row.candidate.name,
            count(row.size),
            f"{row.work:.0%}",
            f"{row.seconds:.3f}" if row.seconds else "-",
            f"{row.rate:g}" if row.rate else "-",
            "-" if row.short_loss is None else f"{row.short_loss:.3f}",
            sayings.value(row.value),
            escape(sayings.points(row.gain)),
            "yes" if row.near else "",
        )
    return table


def bar(share: float, width: int = BAR) -> str:
    """A bar of a share of `width` letters, to an eighth of a letter."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return (BLOCKS[8] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")).ljust(1)
