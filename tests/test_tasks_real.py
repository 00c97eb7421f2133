"""Fine-tuning pays: on real questions and a real encoder, what opens after the first stage beats that stage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from running import events

from engine import start
from engine.load import load
from engine.records import Evaluated

ROOT = Path(__file__).parent.parent
SHORT = {
    "choices": ("train[:500]", ["stages.head.epochs=2", "stages.top.epochs=3", "batch_size=16"]),
    "domain": ("train[:500]", ["stages.head.epochs=3", "stages.top.epochs=3", "batch_size=16"]),
    # a first stage that leaves the model as it was
    "pairs": ("train[:900]", ["stages.last.steps=1", "stages.last.epochs=null", "stages.last.learning_rate=1e-9"]),
}
"""Recipe -> the rows it trains on here, and how else it is shortened."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "metric", "gain"),
    [
        ("choices", "head", "accuracy", 0.2),
        ("domain", "head", "perplexity", -100.0),
        ("pairs", "last", "spearman", 0.2),
    ],
)
def test_the_second_stage_beats_the_first(tmp_path: Path, name: str, first: str, metric: str, gain: float) -> None:
    sys.path.append(str(ROOT / "scripts"))
    import _questions

    _questions.prepare(tmp_path / "data")
    rows, shortened = SHORT[name]
    keys = [f"data.splits.train={rows}", "data.splits.validation=validation[:200]", "data.splits.test=null"]
    happened = list(start.run(load(ROOT / f"recipes/{name}.yaml", [*keys, *shortened]), name, tmp_path, tmp_path))
    judged = events(happened, Evaluated)
    before = [event.metrics[metric] for event in judged if event.stage == first][-1]
    after = [event.metrics[metric] for event in judged if event.stage == "top"][-1]
    print(name, metric, before, after)
    assert (after - before > gain) if gain > 0 else (after - before < gain)
