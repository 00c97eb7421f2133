"""A stage's shortcut: what the stages to come need is captured with it, unless that would be wrong or too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_frostline import only, staged
from test_prefix import Texts, captures, collated

from engine import freezing
from engine.data import Split
from engine.frost.prefix import Cache
from engine.frost.shortcut import Shortcut, open_shortcut

HEAD = ("classifier", "bert.pooler")
TOP = (*HEAD, "bert.encoder.layer.3")
HALF = (*TOP, "bert.encoder.layer.2")


def named(model: Any, modules: tuple[str, ...]) -> set[str]:
    only(model, *modules)
    return set(freezing.trainable(model))


def opening(model: Any, split: Split, folder: Path, *stages: tuple[str, ...], **more: Any) -> Shortcut:
    """The shortcut of the first stage, the others being ahead."""
    ahead = [named(model, modules) for modules in stages[1:]]
    only(model, *stages[0])
    return open_shortcut(model, [split], collated, Cache(folder, batch_size=8, **more), 3, lambda no: no, ahead=ahead)


@pytest.fixture
def split() -> Split:
    return Split(Dataset.from_list(Texts().rows))


def test_a_schedule_from_the_head_down_is_captured_once(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = staged("Bert cls", "head")
    seen = captures(monkeypatch)
    stages = (HEAD, TOP, HALF)
    for place in range(3):
        assert opening(model, split, tmp_path / "kept", *stages[place:]).prefixes
        assert sum(seen) == len(split)


def test_what_trains_below_a_later_line_is_not_captured_ahead(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = staged("Bert cls", "head")
    assert opening(model, split, tmp_path / "kept", HALF, HEAD).prefixes
    assert len(list((tmp_path / "kept").glob("*1-of-1*"))) == 1
    assert opening(model, split, tmp_path / "all", HEAD, HALF).prefixes
    assert len(list((tmp_path / "all").glob("*1-of-1*"))) == 2


def test_where_all_of_them_are_too_much_a_stage_keeps_its_own(tmp_path: Path, split: Split) -> None:
    model, _ = staged("Bert cls", "head")
    own = opening(model, split, tmp_path / "own", TOP)
    size = sum(prefix.size for prefix in own.prefixes.values())
    found = opening(model, split, tmp_path / "kept", TOP, HALF, budget=round(size * 1.5))
    assert found.prefixes
    assert found.said == own.said
