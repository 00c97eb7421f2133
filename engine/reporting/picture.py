"""A plan as a picture: layers against stages, who trains where and at which rate, and where the frost line lies.

It draws what plan.json says, in a terminal or as SVG and PNG, and it knows no model and no run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FROZEN, ADAPTERS, WEIGHTS, PART, BOTH = "frozen", "adapters", "weights", "part", "both"
WORDS = {
    FROZEN: "frozen",
    ADAPTERS: "adapters train",
    WEIGHTS: "weights train",
    PART: "some weights train",
    BOTH: "weights and adapters train",
}


@dataclass(frozen=True)
class Cell:
    """One layer in one stage."""

    kind: str
    """`frozen`, `adapters`, `weights`, `part` (of the weights) or `both`."""
    learning_rates: tuple[float, ...] = ()
    """Peak rates, highest first."""
    line: bool = False
    """Whether the frost line lies right below: nothing further down trains in this stage."""


@dataclass(frozen=True)
class Row:
    """One layer, or several of a kind in a row that fare alike in every stage."""

    name: str
    role: str
    size: int
    count: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Column:
    """One stage."""

    name: str
    learning_rates: tuple[float, ...]
    steps: int
    size: int
    """Elements that train."""
    share: float
    """Of the model's elements; above 1 never, adapters may add to it."""
    bytes: int
    """Optimizer state and gradients."""
    below: float
    cost: float
    cached_cost: float
    opens: tuple[str, ...]
    memory: tuple[int, int] | None
    """Bytes at the peak, as forecast: on a GPU, on a CPU; None where the plan is older than forecasts."""
    disk: int
    """Bytes that the cache will take."""
    seconds: float | None
    """How long it will take, where a machine's rate is known."""


@dataclass(frozen=True)
class Picture:
    """Rows from the head down to the embeddings, columns from the first stage to the last."""

    architecture: str
    size: int
    examples: int
    batch_size: int
    measured: bool
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of cell that occur, for a legend."""
        found = {cell.kind for row in self.rows for cell in row.cells}
        return tuple(kind for kind in WORDS if kind in found)


def picture(plan: Mapping[str, Any], folded: bool = False) -> Picture:
    """The picture of a plan as plan.json has it; `folded` draws neighbours that fare alike as one row."""
    rows = _rows(plan)
    if folded:
        rows = [_fold(list(alike)) for _, alike in groupby(rows, key=_likeness)]
    return Picture(
        architecture=plan["architecture"],
        size=plan["size"],
        examples=plan["examples"],
        batch_size=plan["batch_size"],
        measured=plan["measured"],
        rows=tuple(reversed(rows)),
        columns=tuple(_column(stage, plan["size"]) for stage in plan["stages"]),
    )


def _rows(plan: Mapping[str, Any]) -> list[Row]:
    """One row a layer, in forward order."""
    stages = plan["stages"]
    lowest = [next((i for i, state in enumerate(stage["layers"]) if _trains(state)), None) for stage in stages]
    return [
        Row(
            name=layer["name"],
            role=layer["role"],
            size=layer["size"],
            count=1,
            cells=tuple(
                _cell(layer, stage["layers"][index], index == low) for stage, low in zip(stages, lowest, strict=True)
            ),
        )
        for index, layer in enumerate(plan["layers"])
    ]


def _trains(state: Mapping[str, Any]) -> bool:
    return bool(state["weights"] or state["adapters"])


def _cell(layer: Mapping[str, Any], state: Mapping[str, Any], line: bool) -> Cell:
    kind = FROZEN
    if state["weights"] and state["adapters"]:
        kind = BOTH
    elif state["adapters"]:
        kind = ADAPTERS
    elif state["weights"]:
        kind = WEIGHTS if state["weights"] >= layer["size"] else PART
    return Cell(kind, tuple(state["learning_rates"]), line)


def _column(stage: Mapping[str, Any], whole: int) -> Column:
    told = stage.get("forecast")  # a kept run may be older than forecasts
    return Column(
        name=stage["name"],
        learning_rates=tuple(sorted({group["learning_rate"] for group in stage["groups"]}, reverse=True)),
        steps=stage["steps"],
        size=stage["size"],
        share=stage["size"] / whole if whole else 0.0,
        bytes=stage["optimizer_bytes"] + stage["gradient_bytes"],
        below=stage["below"],
        cost=stage["cost"],
        cached_cost=stage["cached_cost"],
        opens=tuple(opening["pattern"] for opening in stage["opens"]),
        memory=(told["memory"]["total"], told["memory"]["process"]) if told else None,
        disk=told["cache_bytes"] if told else 0,
        seconds=told["seconds"] if told else None,
    )


def _likeness(row: Row) -> tuple[Any, ...]:
    """What neighbours share that are drawn as one: blocks of one stack do, two parts of a head don't."""
    family = re.sub(r"\d+$", "", row.name) if row.role == "block" else row.name
    return family, row.role, *(cell.kind for cell in row.cells)


def _fold(rows: Sequence[Row]) -> Row:
    """Alike layers in forward order as one row; where the frost line lies below any, it lies below the first."""
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return first
    name = f"{first.name}-{last.name.rpartition('.')[2]}"
    cells = []
    for index, cell in enumerate(first.cells):
        every = {value for row in rows for value in row.cells[index].learning_rates}
        cells.append(Cell(cell.kind, tuple(sorted(every, reverse=True)), cell.line))
    return Row(name, first.role, sum(row.size for row in rows), len(rows), tuple(cells))


def rate(value: float) -> str:
    """0.0002 -> `2e-4`: as people write rates."""
    return f"{value:.2g}" if value >= 0.01 else re.sub(r"\.0(?=e)|(?<=e-)0", "", f"{value:.1e}")


def rates(values: Sequence[float]) -> str:
    """One rate, or the highest and the lowest."""
    return " to ".join(rate(value) for value in dict.fromkeys((values[0], values[-1]))) if values else ""


INKS = {FROZEN: "bright_black", ADAPTERS: "yellow", WEIGHTS: "bright_red", PART: "red", BOTH: "bright_red"}
MARKS = {FROZEN: "·", ADAPTERS: "▒", WEIGHTS: "█", PART: "▄", BOTH: "▓"}
WIDTH = 10
"""Signs of a stage's column in a terminal."""


def tables(drawn: Picture, width: int) -> list[Table]:
    """The picture as rich tables, as many stages beside each other as `width` signs hold."""
    names = max(len(row.name) for row in drawn.rows) + 12
    fit = max(1, (width - names) // (max(WIDTH, *(len(column.name) for column in drawn.columns)) + 2))
    starts = range(0, len(drawn.columns), fit)
    return [_table(drawn, range(start, min(start + fit, len(drawn.columns)))) for start in starts]


def _table(drawn: Picture, stages: Sequence[int]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("", *(drawn.columns[stage].name for stage in stages)):
        table.add_column(title, no_wrap=True)
    table.add_column("size", justify="right", header_style="dim")
    for row in drawn.rows:
        blocks = [_block(drawn, row.cells[stage], stage) for stage in stages]
        table.add_row(row.name, *blocks, f"[dim]{count(row.size) if row.size else 'tied'}[/]")
        if any(row.cells[stage].line and row is not drawn.rows[-1] for stage in stages):
            lines = ["[cyan]" + "━" * WIDTH + "[/]" if row.cells[stage].line else "" for stage in stages]
            table.add_row("[cyan]frost line[/]", *lines, "")
    table.add_row()
    for title, values in _figures([drawn.columns[stage] for stage in stages]):
        table.add_row(f"[dim]{title}[/]", *values, "")
    return table


def _block(drawn: Picture, cell: Cell, stage: int) -> str:
    several = len(drawn.columns[stage].learning_rates) > 1
    said = rates(cell.learning_rates) if several else ""
    bar = MARKS[cell.kind] * (WIDTH if not said else max(2, WIDTH - len(said) - 1))
    return f"[{INKS[cell.kind]}]{bar}[/]" + (f" {said}" if said else "")


def _figures(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """The numbers below a picture, one list a line."""
    return [
        ("trains", [f"{count(column.size)}, {portion(column.share)}" for column in columns]),
        ("learning rate", [rates(column.learning_rates) for column in columns]),
        ("steps", [f"{column.steps:,}" for column in columns]),
        ("optimizer + gradients", [weight(column.bytes) for column in columns]),
        ("work of a step", [portion(column.cost) for column in columns]),
        ("with replay", [portion(column.cached_cost) for column in columns]),
        ("memory on a GPU", [weight(column.memory[0]) if column.memory else "-" for column in columns]),
        ("memory on a CPU", [weight(column.memory[1]) if column.memory else "-" for column in columns]),
        ("kept on disk", [weight(column.disk) if column.disk else "-" for column in columns]),
        ("time, estimate", [duration(column.seconds) for column in columns]),
    ]


def count(number: float) -> str:
    """1234567 -> `1.2 M`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f}"


def weight(number: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: `3 min 5 s`."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def portion(share: float) -> str:
    """A share in percent, a small one to a tenth; something is never rounded to nothing."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


LIGHT = {
    "paper": "#ffffff",
    "ink": "#17212b",
    "quiet": "#5b6b7a",
    "line": "#0b7fa8",
    FROZEN: "#dfe9f1",
    ADAPTERS: "#f3c99b",
    WEIGHTS: "#d1570f",
    PART: "#e8a06c",
    BOTH: "#d1570f",
}
DARK = {
    "paper": "#0f1720",
    "ink": "#e8eef4",
    "quiet": "#9fb0c0",
    "line": "#4cc3ec",
    FROZEN: "#22303d",
    ADAPTERS: "#8a5a2c",
    WEIGHTS: "#f0813a",
    PART: "#b06a38",
    BOTH: "#f0813a",
}
"""Blue for what is frozen, orange for what trains: eyes that can't tell red from green can tell these."""
MOST_ROWS = 40
"""Rows that are drawn one by one; a taller model is folded."""


def save(plan: Mapping[str, Any], path: Path, dark: bool = False) -> Path:
    """Draw a plan into an SVG or PNG file, by the ending of `path`; the same plan gives the same bytes."""
    import matplotlib

    drawn = picture(plan, folded=len(plan["layers"]) > MOST_ROWS)
    colours = DARK if dark else LIGHT
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "frostline", "font.family": "sans-serif", "font.size": 9.5}
    with matplotlib.rc_context(settings):
        figure = _figure(drawn, colours)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(
            path, facecolor=colours["paper"], metadata=metadata, dpi=160, bbox_inches="tight", pad_inches=0.2
        )
    return path


def _figure(drawn: Picture, colours: Mapping[str, str]) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows, columns = len(drawn.rows), len(drawn.columns)
    figure = Figure(figsize=(2.4 + 1.35 * columns, 1.5 + 0.3 * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.02, columns), ylim=(rows + 2.4, -1.1))
    axes.axis("off")
    for y, row in enumerate(drawn.rows):
        label = {"color": colours["ink"], "ha": "right", "va": "center", "family": "monospace", "size": 8.5}
        axes.text(-0.08, y + 0.5, row.name, **label)
        for x, cell in enumerate(row.cells):
            _draw(axes, x, y, cell, len(drawn.columns[x].learning_rates) > 1, colours)
    for x, column in enumerate(drawn.columns):
        _caption(axes, x, rows, column, colours)
    _legend(axes, drawn, colours)
    return figure


def _draw(axes: Any, x: int, y: int, cell: Cell, several: bool, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Rectangle

    hatch = "////" if cell.kind in (ADAPTERS, BOTH) else None
    box = {"facecolor": colours[cell.kind], "edgecolor": colours["paper"], "linewidth": 2.0, "hatch": hatch}
    axes.add_patch(Rectangle((x, y), 0.94, 1, **box))
    if several and cell.learning_rates:
        ink = colours["ink"] if cell.kind == ADAPTERS else colours["paper"]
        behind = {"facecolor": colours[cell.kind], "edgecolor": "none", "pad": 1.5}  # hatching would cross it out
        axes.text(
            x + 0.47, y + 0.5, rates(cell.learning_rates), color=ink, ha="center", va="center", size=8, bbox=behind
        )
    if cell.line:
        axes.plot([x - 0.01, x + 0.95], [y + 1, y + 1], color=colours["line"], linewidth=3.2, solid_capstyle="round")


def _caption(axes: Any, x: int, rows: int, column: Column, colours: Mapping[str, str]) -> None:
    axes.text(x + 0.47, -0.25, column.name, color=colours["ink"], ha="center", va="bottom", weight="bold", size=10.5)
    lines = (f"rate {rates(column.learning_rates)}", f"{column.steps:,} steps", f"{portion(column.share)} trains")
    for number, said in enumerate(lines):
        axes.text(x + 0.47, rows + 0.3 + 0.6 * number, said, color=colours["quiet"], ha="center", va="top", size=8.5)


def _legend(axes: Any, drawn: Picture, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    signs: list[Any] = [
        Patch(
            facecolor=colours[kind],
            edgecolor=colours["paper"],
            hatch="////" if kind in (ADAPTERS, BOTH) else None,
            label=WORDS[kind],
        )
        for kind in drawn.kinds
    ]
    signs.append(Line2D([], [], color=colours["line"], linewidth=3.2, label="frost line"))
    place = {"loc": "upper center", "bbox_to_anchor": (0.4, 0.0), "ncols": len(signs), "frameon": False}
    axes.legend(handles=signs, labelcolor=colours["quiet"], fontsize=8.5, **place)
