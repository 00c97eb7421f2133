"""What schedules generate: which blocks are open when, that what they leave freezes, and what follows from a seed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import staged
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from running import FROZEN, events, place, refused, run
from safetensors.torch import load_file

from engine.models import draft
from engine.plan import Plan
from engine.recipe import Recipe, Stages
from engine.records import StageStarted
from engine.schedules import SCHEDULES

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

REFREEZING: dict[str, dict[str, Any]] = {
    "sliding": {"blocks_per_stage": 2},
    "lisa": {"stages": 6, "blocks_per_stage": 2, "seed": 1},
    "block_coordinate": {"cycles": 2, "seed": 1},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gradual": {},
    "lp_ft": {},
    "chain_thaw": {},
    "surgical": {"unfreeze": "@blocks[:2]", "head_epochs": 1.0},
    "bitfit": {},
}


def plan(
    kind: str, blocks: int = 6, freeze: Any = tuple(FROZEN), training: dict[str, Any] | None = None, **keys: Any
) -> Plan:
    stages = {"type": kind, "steps": 4} | (REFREEZING | OTHERS)[kind] | keys
    asked = {"model": "m", "task": "text-classification", "data": "d", "freeze": freeze, "stages": stages}
    with torch.device("meta"):
        model = tiny.bert(num_hidden_layers=blocks)
    return draft(Recipe.model_validate(asked | {"training": training or {}}), model, 100)[0]


def open_blocks(made: Plan) -> list[set[int]]:
    """For each stage the blocks that train."""
    return [
        {int(name.split(".")[3]) for name in stage.trainable if name.startswith("bert.encoder.layer.")}
        for stage in made.stages
    ]


def test_every_schedule_is_tried_here():
    kinds = {schedule.model_fields["type"].annotation.__args__[0] for schedule in SCHEDULES}
    assert kinds == REFREEZING.keys() | OTHERS.keys()


@pytest.mark.parametrize("kind", [*REFREEZING, *OTHERS])
def test_every_schedule_goes_with_rates_by_layer_and_is_pure(kind: str):
    training = {"layer_decay": 0.5, "learning_rate": 1e-4, "weight_decay": 0.1}
    made, again = plan(kind, training=training), plan(kind, training=training)
    assert made == again
    for stage in made.stages:
        rates = {name: group.learning_rate for group in stage.groups for name in group.parameters}
        blocks = {int(n.split(".")[3]): rate for n, rate in rates.items() if n.startswith("bert.encoder.layer.")}
        peak = rates.get("classifier.bias")
        for block, rate in blocks.items():
            assert peak is None or rate == pytest.approx(peak * 0.5 ** (6 - block))


def test_a_window_slides_down_and_freezes_what_it_leaves():
    assert open_blocks(plan("sliding")) == [set(), {4, 5}, {3, 4}, {2, 3}, {1, 2}, {0, 1}]
    assert open_blocks(plan("sliding", direction="up", stride=2)) == [set(), {0, 1}, {2, 3}, {4, 5}]


def test_a_window_that_does_not_fit_evenly_still_reaches_the_end():
    assert open_blocks(plan("sliding", blocks_per_stage=4, stride=3)) == [set(), {2, 3, 4, 5}, {0, 1, 2, 3}]
    assert open_blocks(plan("sliding", blocks_per_stage=6)) == [set(), {0, 1, 2, 3, 4, 5}]


def test_lisa_draws_as_many_as_asked_and_all_alike():
    draws = open_blocks(plan("lisa", stages=300, steps=1))
    assert {len(drawn) for drawn in draws} == {2}
    often = Counter(block for drawn in draws for block in drawn)
    # Each block is in a draw with probability 1/3; 300 draws have a standard deviation of 8.2.
    assert all(abs(often[block] - 100) < 4 * 8.2 for block in range(6))
    assert any(first == second for first, second in pairwise(draws)), "draws are independent"


def test_lisa_leaves_open_what_the_recipe_does():
    made = plan("lisa", freeze="@blocks", blocks_per_stage=1)
    for stage in made.stages:
        assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} <= set(stage.trainable)


def test_seeds_decide_draws_and_nothing_else_does():
    assert open_blocks(plan("lisa")) == open_blocks(plan("lisa"))
    assert open_blocks(plan("lisa")) != open_blocks(plan("lisa", seed=2))
    code = "from engine.schedules import *; from engine.schedules.lisa import LISA;"
    code += "print([e.unfreeze for e in LISA(type='lisa', steps=1, seed=1, stages=6).entries(6, 1.0)])"
    printed = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=Path(__file__).parent.parent,
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1


def test_each_cycle_gives_every_block_its_turn():
    turns = [next(iter(each)) for each in open_blocks(plan("block_coordinate"))]
    assert sorted(turns[:6]) == sorted(turns[6:]) == list(range(6))
    assert turns[:6] != turns[6:]
    downwards = open_blocks(plan("block_coordinate", cycles=1, order="descending"))
    assert downwards == [{5}, {4}, {3}, {2}, {1}, {0}]


def test_rates_fall_from_cycle_to_cycle():
    made = plan("block_coordinate", learning_rate_decay=0.5, training={"learning_rate": 1e-4})
    assert [stage.groups[0].learning_rate for stage in made.stages] == [1e-4] * 6 + [0.5e-4] * 6


def test_bitfit_trains_biases_and_the_head():
    (only,) = plan("bitfit").stages
    head = {name for name in only.trainable if name.startswith(("classifier", "bert.pooler"))}
    assert {name.rpartition(".")[2] for name in set(only.trainable) - head} == {"bias"}
    assert "classifier.weight" in head


def test_surgery_opens_one_set_of_blocks():
    assert open_blocks(plan("surgical")) == [set(), {0, 1}]
    assert open_blocks(plan("surgical", head_epochs=None, unfreeze="@blocks[2:4]")) == [{2, 3}]


def test_more_blocks_than_there_are_is_refused(tmp_path: Path):
    root = place(tmp_path)
    for kind in ("sliding", "lisa"):
        key, said = refused(root, freeze=FROZEN, stages={"type": kind, "steps": 2, "blocks_per_stage": 5})
        assert (key, said.split(";")[0]) == (("stages",), "it opens 5 blocks at a time, and this model has 4")


def test_biases_of_a_model_without_any_are_refused(tmp_path: Path):
    root = place(tmp_path, tiny.llama())
    tiny.byte_level().save_pretrained(root / "model")
    keys = {"task": "text-generation", "freeze": FROZEN, "stages": {"type": "bitfit", "steps": 2}}
    _, said = refused(root, **keys)
    assert "`@biases` names no module" in said


@pytest.mark.parametrize("keys", [{"blocks_per_stage": 0}, {"seed": -1}, {"stages": 0}, {"steps": None}, {"blocks": 1}])
def test_schedules_are_strict(keys: dict[str, Any]):
    with pytest.raises(ValidationError):
        TypeAdapter(Stages).validate_python({"type": "lisa", "steps": 2} | keys)


@pytest.mark.parametrize("kind", REFREEZING)
def test_what_is_frozen_again_stays_as_it_was_left(tmp_path: Path, kind: str):
    """The run proves at its end that nothing moved but what some stage trained; here, that each stage moved its own."""
    root = place(tmp_path)
    stages = {"type": kind, "steps": 2} | REFREEZING[kind] | ({"stages": 3} if kind == "lisa" else {})
    stages |= {"cycles": 1} if kind == "block_coordinate" else {}
    happened = run(root, freeze=FROZEN, stages=stages, training={"learning_rate": 1e-2, "save_total_limit": 20})
    assert len(events(happened, StageStarted)) >= 3
    ends = sorted((root / "runs/recipe/checkpoints").glob("stage-*-step-000000"))
    saved = [load_file(end / "weights.safetensors") for end in ends]
    opened = [event.stage for event in events(happened, StageStarted)]
    for name, before, after in zip(opened[1:], saved, saved[1:], strict=False):
        changed = {n.split(".")[3] for n in before if "encoder.layer" in n and not torch.equal(before[n], after[n])}
        kept = {n.split(".")[3] for n in before if "encoder.layer" in n}
        assert kept - changed or len(kept) == len(changed) <= 2, name


@pytest.mark.parametrize("kind", ["lisa", "block_coordinate"])
def test_moments_of_what_freezes_are_forgotten(tmp_path: Path, kind: str):
    root = place(tmp_path)
    stages = {"type": kind, "steps": 2, "seed": 1} | ({"stages": 3} if kind == "lisa" else {"cycles": 1})
    run(root, freeze=FROZEN, stages=stages, training={"learning_rate": 1e-2, "save_total_limit": 20})
    for end in sorted((root / "runs/recipe/checkpoints").glob("stage-*-step-000000")):
        moments = {name.split(".")[3] for name in load_file(end / "moments.safetensors") if "encoder.layer" in name}
        assert len(moments) == (2 if kind == "lisa" else 1)


def test_ends_of_generated_stages_make_room(tmp_path: Path):
    run(place(tmp_path), freeze=FROZEN, stages={"type": "lisa", "steps": 1, "stages": 6})
    assert len(list((tmp_path / "runs/recipe/checkpoints").glob("stage-*"))) == 2


@pytest.mark.parametrize(
    "kind", ["lisa", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sliding", "block_coordinate"))]
)
def test_cut_off_in_each_stage_it_goes_on_to_the_same_bits(tmp_path: Path, kind: str):
    stages = {"type": kind, "steps": 3} | REFREEZING[kind] | ({"stages": 3} if kind == "lisa" else {})
    stages |= {"cycles": 1} if kind == "block_coordinate" else {}
    training = {**staged.RECIPE["training"], "save_steps": 1}
    whole, cut = (staged.place(tmp_path / n, freeze=FROZEN, stages=stages, training=training) for n in ("one", "two"))
    assert staged.run(whole) == [0], staged.said(whole)
    code, cuts = -1, 0
    while code:
        (code,) = staged.run(cut, plant=staged.signal_at(4, staged.signal.SIGKILL))
        cuts += code != 0
        assert cuts < 12, staged.said(cut)
    assert cuts >= 2
    assert staged.equal(staged.weights(whole), staged.weights(cut))
    assert staged.history(whole) == staged.history(cut)
