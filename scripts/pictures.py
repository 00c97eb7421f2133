"""Draws the pictures of README.md: `docs/layers.svg` and `.png`, light and dark, from the plan of recipes/trec.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import start  # noqa: E402
from engine.load import load  # noqa: E402
from engine.reporting import picture  # noqa: E402

EXAMPLES = 1_700
"""Training questions of recipes/trec.yaml: with their number given, the data themselves need not be there."""


def draw(folder: Path) -> list[Path]:
    """Draw them into a folder and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = start.draft(load(ROOT / "recipes/trec.yaml"), ROOT, EXAMPLES).plan.json()
    names = {"layers.svg": False, "layers.png": False, "layers-dark.svg": True, "layers-dark.png": True}
    return [picture.save(plan, folder / name, dark) for name, dark in names.items()]


if __name__ == "__main__":
    for path in draw(ROOT / "docs"):
        print(path.relative_to(ROOT))
