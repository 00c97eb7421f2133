"""The picture of a plan: what it shows follows from plan.json, and the same plan gives the same bytes."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from io import StringIO
from pathlib import Path

import pytest
import running
import tiny
from rich.console import Console

from engine import screen
from engine.load import load
from engine.modelling.outlining import outline
from engine.plan import Plan, make
from engine.records import StageEnded
from engine.reporting import picture

LORA = {"type": "lora", "target_modules": ["query", "value"], "r": 2}
STAGES = [
    running.stage("head"),
    running.stage("top", unfreeze="@blocks[-2:]", learning_rate={"@head": 1e-2, "@blocks": 1e-3}, then="merge"),
    running.stage("norms", freeze="@blocks", unfreeze="@norms", learning_rate=1e-4),
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A head, then adapters on two of four blocks, then the norms alone."""
    root = running.place(tmp_path_factory.mktemp("picture"))
    return running.draft(root, freeze=running.FROZEN, adapters=[LORA], stages=STAGES).plan


def kinds(drawn: picture.Picture) -> dict[str, list[str]]:
    return {row.name: [cell.kind for cell in row.cells] for row in drawn.rows}


def test_shows_what_trains(plan: Plan) -> None:
    assert kinds(picture.picture(json.loads(json.dumps(plan.json())))) == {
        "classifier": ["weights", "weights", "weights"],
        "bert.pooler": ["weights", "weights", "weights"],
        "bert.encoder.layer.3": ["frozen", "adapters", "part"],
        "bert.encoder.layer.2": ["frozen", "adapters", "part"],
        "bert.encoder.layer.1": ["frozen", "frozen", "part"],
        "bert.encoder.layer.0": ["frozen", "frozen", "part"],
        "bert.embeddings": ["frozen", "frozen", "part"],
    }


def test_frost_line_lies_below_the_lowest_layer_that_trains(plan: Plan) -> None:
    drawn = picture.picture(plan.json())
    lines = [next(row.name for row in drawn.rows if row.cells[stage].line) for stage in range(3)]
    assert lines == ["bert.pooler", "bert.encoder.layer.2", "bert.embeddings"]
    assert [stage.line for stage in plan.stages][1:] == lines[1:], "the plan's own word for it"


def test_sizes_of_the_layers_are_the_model(plan: Plan) -> None:
    assert sum(layer.size for layer in plan.layers) == plan.size
    for stage in plan.stages:
        assert sum(state.weights + state.adapters for state in stage.layers) == stage.size


def test_rates_stand_where_they_train(plan: Plan) -> None:
    rows = {row.name: row for row in picture.picture(plan.json()).rows}
    assert rows["classifier"].cells[1].learning_rates == (1e-2,)
    assert rows["bert.encoder.layer.3"].cells[1].learning_rates == (1e-3,)
    assert rows["bert.encoder.layer.0"].cells[1].learning_rates == ()


def test_neighbours_that_fare_alike_are_folded(plan: Plan) -> None:
    whole, folded = picture.picture(plan.json()), picture.picture(plan.json(), folded=True)
    assert [row.name for row in folded.rows if row.count > 1] == ["bert.encoder.layer.2-3", "bert.encoder.layer.0-1"]
    assert sum(row.size for row in folded.rows) == sum(row.size for row in whole.rows)
    assert [row.name for row in folded.rows if row.cells[1].line] == ["bert.encoder.layer.2-3"]


def test_layers_that_decay_are_folded_with_the_span_of_their_rates(tmp_path: Path) -> None:
    root = running.place(tmp_path)
    plan = running.draft(root, stages=[running.stage(layer_decay=0.5)]).plan
    blocks = next(row for row in picture.picture(plan.json(), folded=True).rows if row.role == "block")
    assert blocks.count == tiny.BLOCKS
    assert blocks.cells[0].learning_rates == pytest.approx([1e-2 / 2**depth for depth in range(1, 5)])


def test_tied_head_is_shown_with_the_embeddings_it_shares(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"model": "m", "task": "text-generation", "data": "d", "freeze": "h"}))
    shown = kinds(picture.picture(make(load(path).recipe, outline(tiny.gpt2()), 8).json()))
    names = ("lm_head", "transformer.wte", "transformer.h.0")
    assert [shown[name] for name in names] == [["weights"], ["weights"], ["frozen"]]


@pytest.mark.parametrize("width", [60, 160])
def test_terminal_holds_every_stage_and_layer(plan: Plan, width: int) -> None:
    text = StringIO()
    screen.show_plan(Console(file=text, width=width), "it", plan)
    for word in ("head", "top", "norms", "classifier", "bert.encoder.layer.0-1", "frost line", "1e-4"):
        assert word in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= width


@pytest.mark.parametrize("dark", [False, True])
def test_svg_is_the_same_each_time_and_says_the_names(plan: Plan, tmp_path: Path, dark: bool) -> None:
    first, second = (picture.save(plan.json(), tmp_path / name, dark).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    words = {text.strip() for text in xml.etree.ElementTree.fromstring(first).itertext()}
    assert {"classifier", "bert.encoder.layer.0", "top", "adapters train", "frost line"} <= words
    assert (picture.DARK if dark else picture.LIGHT)["paper"].encode() in first


def test_png_is_a_picture(plan: Plan, tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(picture.save(plan.json(), tmp_path / "plan.png")) as image:
        drawn = image.convert("RGB")
        colours = {colour for _, colour in drawn.getcolors(drawn.width * drawn.height)}
    assert tuple(bytes.fromhex(picture.LIGHT[picture.WEIGHTS][1:])) in colours


@pytest.mark.parametrize(
    ("value", "said"),
    [(1e-3, "1e-3"), (2e-4, "2e-4"), (2.5e-5, "2.5e-5"), (0.05, "0.05"), (1.0, "1"), (1e-10, "1e-10")],
)
def test_rates_are_written_as_people_write_them(value: float, said: str) -> None:
    assert picture.rate(value) == said


@pytest.mark.parametrize(("share", "said"), [(0, "0%"), (1e-5, "<0.1%"), (0.007, "0.7%"), (0.0996, "10%"), (1, "100%")])
def test_a_share_of_something_is_never_nothing(share: float, said: str) -> None:
    assert picture.portion(share) == said


def test_movement_counts_what_an_adapter_adds(tmp_path: Path) -> None:
    """The same before and after a merge, nothing below the line, and what the saved model says of its blocks."""
    from transformers import AutoModelForSequenceClassification

    root = running.place(tmp_path)
    stages = [*STAGES[:2], running.stage("last", freeze="@blocks[2:3]", learning_rate=1e-12, restore_best=False)]
    happened = running.run(root, freeze=running.FROZEN, adapters=[LORA], stages=stages)
    head, top, last = (event.moved for event in running.events(happened, StageEnded))
    assert {name for name, share in head.items() if share} == {"bert.pooler", "classifier"}
    assert {name for name, share in top.items() if not share} == {f"bert.encoder.layer.{i}" for i in (0, 1)} | {
        "bert.embeddings"
    }
    assert last == pytest.approx(top, rel=1e-4)
    saved = AutoModelForSequenceClassification.from_pretrained(root / "runs/recipe/model").state_dict()
    start = AutoModelForSequenceClassification.from_pretrained(root / "model").state_dict()
    for name, share in last.items():
        if name.startswith("bert.encoder"):
            keys = [key for key in start if key.startswith(f"{name}.")]
            change = sum((saved[key] - start[key]).square().sum().item() for key in keys) ** 0.5
            assert share == pytest.approx(
                change / sum(start[key].square().sum().item() for key in keys) ** 0.5, rel=1e-4
            )
