"""Which line of a csv file has other cells than its header, and which delimiter would give it as many.

Reads a file again where its reader has failed or has left cells empty. It never guesses a delimiter to read by.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from engine.errors import Key, Problem

KNOWN = {",": "`,`", ";": "`;`", "\t": "a tab", "|": "`|`"}
"""Delimiters that are in use, as they are called in a sentence."""
FIRST = 1000
"""Rows that are looked at where a file is read as a stream."""


def of(file: Path) -> str:
    """The delimiter that a file is read by, as its suffix says."""
    return "\t" if file.suffix == ".tsv" else ","


def uneven(files: Iterable[Path], key: Key, most: int | None = None) -> Problem | None:
    """The problem of the first row whose cells are not those of its header, or None.

    A row may end early, for what is missing is told of elsewhere; not so if another delimiter fills it.
    """
    for file in files:
        try:
            if problem := _uneven(file, key, most):
                return problem
        except csv.Error:  # a cell beyond the module's limit: only what came before it could be looked at
            continue
    return None


def _uneven(file: Path, key: Key, most: int | None) -> Problem | None:
    mine = of(file)
    rows = _rows(file, mine)
    head = next(rows, ("", []))
    width, other = len(head[1]), ""
    if width == 1:
        other = next((each for each in KNOWN if each != mine and len(_cells(head[0], each)) > 1), "")
    for number, (line, cells) in enumerate(islice(rows, most), 1):
        if other and len(_cells(line, other)) == len(_cells(head[0], other)):
            what = f"{file.name}, row 1: it and the header have {KNOWN[other]} between their cells, not {KNOWN[mine]}"
            return Problem(key, what, _rewrite(mine))
        other = ""
        filled = next((each for each in KNOWN if each != mine and len(_cells(line, each)) == width > 1), "")
        if len(cells) != width and filled:
            counts = f"{len(cells)} by {KNOWN[mine]} as the header has them, and {width} by {KNOWN[filled]}"
            return Problem(key, f"{file.name}, row {number}: of {width} cells it has {counts}", _rewrite(mine))
        if len(cells) > width:
            what = f"{file.name}, row {number}: it has more cells than its header has names, {len(cells)} and {width}"
            return Problem(key, what, f"put cells that hold {KNOWN[mine]} in quotes")
    return None


def _rows(file: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The text and the cells of each row, the header among them; blank lines are none."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        taken: list[str] = []

        def lines() -> Iterator[str]:
            for line in stream:
                taken.append(line)
                yield line

        for cells in csv.reader(lines(), delimiter=delimiter):
            text = "".join(taken).rstrip("\r\n")
            taken.clear()
            if cells:
                yield text, cells


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _rewrite(mine: str) -> str:
    advice = f"save the file with {KNOWN[mine]} between all cells, and cells that hold it in quotes"
    return advice if mine == "\t" else f"{advice}; or with tabs, as .tsv"
