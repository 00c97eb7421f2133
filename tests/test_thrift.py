"""Notes on recipes that pay without gain: given where something can be saved, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import running

from engine.load import load
from engine.planning import thrift

HEAD = running.stage("head", epochs=3)


def noted(root: Path, **keys: Any) -> tuple[str, ...]:
    drafted = running.draft(root, **{"cache": "auto", **keys})
    return thrift.notes(load(root / "recipe.yaml").recipe, drafted.plan, drafted.outline)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running.place(tmp_path_factory.mktemp("thrift"))


def test_a_thrifty_recipe_gets_no_note(root: Path) -> None:
    assert noted(root, freeze=running.FROZEN, stages=[HEAD]) == ()
    assert noted(root) == (), "where all of it trains, nothing small lies below"


def test_one_norm_in_the_embeddings_is_noted_with_its_pattern_and_price(root: Path) -> None:
    stage = running.stage("top", unfreeze=["@blocks[-1]", "embeddings.LayerNorm"], epochs=3)
    (said,) = noted(root, freeze=running.FROZEN, stages=[stage])
    assert said.startswith("stage `top`: `embeddings.LayerNorm` opens 32 elements in `bert.embeddings`")
    assert int(re.search(r"costs (\d+)% less", said)[1]) > 50  # pyright: ignore
    assert noted(root, freeze=running.FROZEN, stages=[{**stage, "unfreeze": ["@blocks[-1]"]}]) == ()


def test_a_cache_that_is_off_is_noted_where_it_would_pay(root: Path) -> None:
    (said,) = noted(root, freeze=running.FROZEN, stages=[HEAD], cache="off")
    assert "`cache: off` computes the frozen" in said
    assert "3 times over" in said
    assert noted(root, freeze=running.FROZEN, stages=[{**HEAD, "epochs": 1}], cache="off") == ()


def test_a_budget_that_is_too_small_is_noted(root: Path) -> None:
    (said,) = noted(root, freeze=running.FROZEN, stages=[HEAD], cache={"budget": 1e-6})
    assert "more than `cache.budget`" in said


def test_activations_computed_again_for_nothing_are_noted(root: Path) -> None:
    again = {"activation_checkpointing": True}
    (said,) = noted(root, freeze=running.FROZEN, stages=[HEAD], training=again)
    assert said.startswith("stage `head`: `activation_checkpointing` finds no block")
    assert noted(root, training=again, batch_size=256) == (), "it spares much where all of it trains on many examples"
    top = running.stage("top", unfreeze="@blocks[-1]", epochs=3)  # one block alone is held whole while it comes again
    (said,) = noted(root, freeze=running.FROZEN, stages=[top], training=again)
    assert re.search(r"computes \d+% more a step and spares 0.0% of the memory", said)
