"""TREC questions told in two other ways, as JSON lines: pairs with a score, and a choice of four answers each.

Questions stay in the split they have in `_trec`, so none is trained on in one way and judged by in another. Reads an
installed package and no network; draws from a fixed seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import _trec

AFTER = {
    "abbreviation": "an abbreviation or what it stands for",
    "description": "a definition, a reason or a manner",
    "entity": "a thing, such as an animal, a colour or a work of art",
    "person": "a person or a group of people",
    "place": "a city, a country or another place",
    "number": "a number, a date or an amount",
}
"""What a question may be after, in words."""
CHOICES = 4
Rows = list[dict[str, Any]]


def prepare(folder: Path) -> dict[str, dict[str, Rows]]:
    """`<folder>/pairs/<split>.jsonl` and `<folder>/choices/<split>.jsonl`, made anew from `<folder>/trec`."""
    kinds = fine_kinds()
    made: dict[str, dict[str, Rows]] = {"pairs": {}, "choices": {}}
    for split, rows in _trec.prepare(folder / "trec").items():
        made["pairs"][split] = pairs(rows, kinds, random.Random(f"{_trec.SEED} pairs {split}"))
        made["choices"][split] = choices(rows, random.Random(f"{_trec.SEED} choices {split}"))
    for name, splits in made.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            _trec.write(rows, folder / name / f"{split}.jsonl")
    return made


def fine_kinds() -> dict[str, str]:
    """Question in lower case -> its fine label, such as `HUM:ind`."""
    kinds: dict[str, str] = {}
    for line in _trec.lines():
        label, _, question = line.partition(" ")
        kinds.setdefault(_trec.clean(question).casefold(), label)
    return kinds


def pairs(rows: list[_trec.Row], kinds: dict[str, str], draw: random.Random) -> Rows:
    """Three pairs a question, where there are three: 1 for the same fine label, 0.5 for the same coarse one, else 0."""
    by_fine, by_coarse = defaultdict(list), defaultdict(list)
    for row in rows:
        by_fine[kinds[row["text"].casefold()]].append(row["text"])
        by_coarse[row["label"]].append(row["text"])
    made = []
    for row in rows:
        fine, coarse = by_fine[kinds[row["text"].casefold()]], by_coarse[row["label"]]
        same = [text for text in fine if text != row["text"]]
        near = sorted(set(coarse) - set(fine))
        far = [text for label in sorted(by_coarse) if label != row["label"] for text in by_coarse[label]]
        for score, others in ((1.0, same), (0.5, near), (0.0, far)):
            if others:
                made.append({"sentence1": row["text"], "sentence2": draw.choice(others), "score": score})
    return made


def choices(rows: list[_trec.Row], draw: random.Random) -> Rows:
    """Each question with what it is after and three things that it isn't, in an order that is drawn."""
    made = []
    for row in rows:
        others = draw.sample(sorted(set(AFTER) - {row["label"]}), CHOICES - 1)
        offered = draw.sample([row["label"], *others], CHOICES)
        label = offered.index(row["label"])
        made.append({"question": row["text"], "choices": [AFTER[kind] for kind in offered], "label": label})
    return made


if __name__ == "__main__":
    for name, splits in prepare(Path(__file__).parent.parent / "data").items():
        print(f"data/{name}: " + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()))
