"""A sweep: which points it goes through, what it chooses and by what, and that it goes on where it was cut short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import running
import tiny

from engine import load, start, sweep
from engine.errors import ENVIRONMENT, STOPPED, PlanError, ProblemsError, RunError
from engine.plan import make
from engine.records import Event
from engine.sweeping import points
from engine.sweeping.curve import Curve, Outcome, Row, Swept, Tried, curve, quantile, speaks
from engine.sweeping.search import Search
from engine.sweeping.sweeppage import page

STAGES = [
    running.stage("head", steps=6, learning_rate=1e-2),
    running.stage("top", unfreeze="@blocks[-2:]", steps=6, learning_rate=3e-3),
]
DATA = {"path": "rows", "splits": {"validation": "validation", "test": "test"}}


def place(root: Path) -> Path:
    """A place with a test split, and a recipe of two stages that names it."""
    running.place(root)
    tiny.write_jsonl(root / "rows/test.jsonl", tiny.reviews(80)[64:])
    return running.recipe(root, cache="auto", freeze=running.FROZEN, data=DATA, stages=STAGES)


def asked(recipe: Path, **more: Any) -> sweep.Asked:
    return sweep.Asked(recipe, **{"depths": ("0", "1"), "rates": (3e-3,), "seeds": 2} | more)


def run(root: Path, **more: Any) -> list[Event]:
    return list(sweep.sweep(asked(root / "recipe.yaml", **more), "swept", root, root / "runs"))


def tried(events: Sequence[Event]) -> list[tuple[str, int, bool]]:
    return [(event.point, event.seed, event.known) for event in events if isinstance(event, Tried)]


# Points


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> points.Base:
    recipe = place(tmp_path_factory.mktemp("base"))
    loaded = load.load(recipe)
    drafted = start.draft(loaded, recipe.parent)
    return points.Base(loaded.recipe, drafted.outline, drafted.plan)


def names(depths: Sequence[points.Opened]) -> str:
    return " ".join(depth.name for depth in depths)


def test_depths_units_and_windows_come_once_each(base: points.Base) -> None:
    assert names(points.opened(base)) == "head top-1 top-2 top-3 all-blocks"
    assert names(points.opened(base, ("all", "4", "full"))) == "all-blocks full"
    # the uppermost block is the depth of one block, and the uppermost window that of two
    units = "head top-1 top-2 top-3 all-blocks block-0 block-1 block-2 embeddings"
    assert names(points.opened(base, units=True)) == units
    assert names(points.opened(base, ("2",), window=2)) == "top-2 blocks-0-1 blocks-1-2"


@pytest.mark.parametrize("word", ["5", "-1", "half", ""])
def test_a_depth_that_the_model_has_not_is_refused(base: points.Base, word: str) -> None:
    with pytest.raises(PlanError, match="is no depth of this model, which has 4 blocks"):
        points.opened(base, (word,))


def test_every_point_is_a_recipe_that_fits(base: points.Base, tmp_path: Path) -> None:
    recipe = place(tmp_path)
    found = points.depth_points(base, points.opened(base, ("0", "1", "full"), units=True))
    trains = {}
    for point in found:
        assert len(point.variants) == 3
        for variant in point.variants[:1]:
            loaded = load.load(recipe, (*variant.words, points.WITHOUT_TEST))
            plan = make(loaded.recipe, base.outline, 48)
            assert loaded.recipe.data.splits.test is None
            assert sum(stage.steps for stage in plan.stages) == 12  # as long as the recipe's own stages
            trains[point.name] = plan.stages[-1].size
    assert trains["head"] < trains["top-1"] == trains["block-0"] < trains["full"]


def test_rates_are_multiples_of_those_of_the_recipe(base: points.Base) -> None:
    head, top = points.depth_points(base, points.opened(base, ("0", "1")))
    assert [variant.name for variant in head.variants] == ["lr0.0033", "lr0.01", "lr0.03"]
    assert [variant.name for variant in top.variants] == ["lr0.001", "lr0.003", "lr0.009"]


def test_a_grid_has_every_combination_under_a_name_of_its_own() -> None:
    spaces = points.overs(["stages.top.learning_rate=1e-5,3e-5", 'freeze=["@blocks", "@embeddings"],"@blocks"'])
    found = points.grid(spaces)
    assert [point.variants[0].words[0] for point in found] == ["stages.top.learning_rate=1e-5"] * 2 + [
        "stages.top.learning_rate=3e-5"
    ] * 2
    assert len({point.name for point in found}) == 4
    assert spaces["freeze"] == ('["@blocks", "@embeddings"]', '"@blocks"')


@pytest.mark.parametrize("word", ["seed", "=1", "batch_size=", "batch_size=8,,16"])
def test_what_names_no_key_with_values_is_refused(word: str) -> None:
    with pytest.raises(PlanError, match="names no key with values"):
        points.overs([word])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"same": "hours"}, "`--same hours` is none of"),
        ({"search": "optuna"}, "`--over` names none"),
        ({"search": "grid", "over": ["a=1"]}, "is not known"),
        ({"rates": ["0"]}, "numbers above 0"),
        ({"rates": ["fast"]}, "numbers above 0"),
        ({"over": ["a=1"], "units": True}, "leave one of them out"),
    ],
)
def test_words_that_contradict_each_other_are_refused(more: dict[str, Any], sentence: str) -> None:
    plain = {"depths": "", "units": False, "window": 0, "rates": [], "seeds": 3, "same": "steps", "over": []}
    with pytest.raises(PlanError, match=sentence):
        sweep.asked(Path("r.yaml"), [], **{**plain, "search": "", "trials": 5, **more})


# The choice


def row(name: str, *values: float | None, size: int = 1, flops: float = 1.0) -> Row:
    found = (Outcome(name, "", seed, value, size=size, flops=flops) for seed, value in enumerate(values))
    return Row(name, "", tuple(found))


@pytest.mark.parametrize(
    ("rows", "greater", "within", "best", "chosen"),
    [
        # clear: only the best is as good as the best
        ([row("a", 0.1, 0.1, size=1), row("b", 0.9, 0.9, size=9)], True, "b", "b", "b"),
        # within one standard error, 0.8 - 0.1: the smaller one is chosen
        ([row("a", 0.71, 0.71, size=1), row("b", 0.7, 0.9, size=9)], True, "ab", "b", "a"),
        ([row("a", 0.69, 0.69, size=1), row("b", 0.7, 0.9, size=9)], True, "b", "b", "b"),
        # lower is better: 0.2 + 0.1
        ([row("a", 0.29, 0.29, size=1), row("b", 0.1, 0.3, size=9)], False, "ab", "b", "a"),
        ([row("a", 0.31, 0.31, size=1), row("b", 0.1, 0.3, size=9)], False, "b", "b", "b"),
        # as small: less work; as much work: better
        ([row("a", 0.75, 0.75, flops=2), row("b", 0.7, 0.9, flops=3)], True, "ab", "b", "a"),
        ([row("a", 0.75, 0.75), row("b", 0.7, 0.9)], True, "ab", "b", "b"),
        # one seed says nothing of its error: ties alone
        ([row("a", 0.9, size=1), row("b", 0.9, size=9), row("c", 0.89, size=0)], True, "ab", "a", "a"),
        # what failed, or is not a number, is no candidate
        ([row("a", None, 0.9), row("b", 0.5, 0.5), row("c", float("nan"))], True, "b", "b", "b"),
        ([row("a", None)], True, "", None, None),
        ([], True, "", None, None),
    ],
)
def test_smallest_within_one_standard_error_of_the_best(
    rows: list[Row], greater: bool, within: str, best: str | None, chosen: str | None
) -> None:
    failing = [Row(r.point, "", tuple(_failed(o) for o in r.outcomes)) for r in rows]
    found = curve("m", greater, failing)
    assert "".join(each.point for each in found.rows if each.within) == within
    assert (found.best.point if found.best else None) == best
    assert (found.chosen.point if found.chosen else None) == chosen


def _failed(outcome: Outcome) -> Outcome:
    return outcome if outcome.value is not None else Outcome(outcome.point, "", outcome.seed, None, failed="it broke")


def test_intervals_are_students() -> None:
    found = row("a", 0.5, 0.6, 0.7)
    assert found.error == pytest.approx(0.1 / 3**0.5)
    assert found.half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert quantile(1) == pytest.approx(12.706, rel=1e-4)
    assert row("a", 0.5).half is None


def test_the_variant_that_speaks() -> None:
    def outcome(name: str, value: float | None, loss: float) -> Outcome:
        return Outcome("p", name, 0, value, loss)

    assert speaks([outcome("a", 0.5, 1), outcome("b", 0.6, 9)], True) == "b"
    assert speaks([outcome("a", 0.5, 1), outcome("b", 0.6, 9)], False) == "a"
    assert speaks([outcome("a", 0.5, 2), outcome("b", 0.5, 1)], True) == "b"  # the lower loss breaks a tie
    assert speaks([outcome("a", None, 1), outcome("b", 0.1, 1)], True) == "b"
    assert speaks([outcome("a", None, 1)], True) is None


# A sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], list[Event]]:
    """A sweep that is stopped in the middle of its third run, and what the same command does then."""
    root = tmp_path_factory.mktemp("sweep")
    place(root)
    before: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "run", _stopping(start.run, "top-1-lr0.003-s42"))
        with pytest.raises(RunError) as caught:
            before.extend(sweep.sweep(asked(root / "recipe.yaml"), "swept", root, root / "runs"))
    assert caught.value.exit_code == STOPPED
    return root, before, run(root)


def _stopping(real: Any, victim: str) -> Any:
    """`start.run`, but that a signal comes in the first stage of one run."""

    def run(loaded: Any, name: str, *more: Any, **options: Any) -> Any:
        for count, event in enumerate(real(loaded, name, *more, **options)):
            if name == victim and count == 6:
                raise RunError("stopped as asked", STOPPED)
            yield event

    return run


def test_a_sweep_goes_on_where_it_was_cut_short(swept: tuple[Path, list[Event], list[Event]]) -> None:
    _, before, after = swept
    assert tried(before) == [("head", 42, False), ("head", 43, False)]
    assert tried(after) == [("head", 42, True), ("head", 43, True), ("top-1", 42, False), ("top-1", 43, False)]
    seen = {(e.point, e.seed): e.value for e in before if isinstance(e, Tried)}
    assert all(seen[e.point, e.seed] == e.value for e in after if isinstance(e, Tried) and e.known)


def test_what_is_over_is_not_run_again(swept: tuple[Path, list[Event], list[Event]]) -> None:
    root, _, after = swept
    again = run(root)
    assert all(known for _, _, known in tried(again))
    assert isinstance(after[-1], Swept)
    assert isinstance(again[-1], Swept)
    assert again[-1].curve == after[-1].curve
    assert again[-1].test == after[-1].test


def test_only_what_was_selected_is_judged_on_the_test_split(swept: tuple[Path, list[Event], list[Event]]) -> None:
    root, _, after = swept
    folders = sorted(path.parent for path in (root / "runs/swept").glob("*/metrics.jsonl"))
    judged = {folder.name: folder.joinpath("metrics.jsonl").read_text().count('"split": "test"') for folder in folders}
    assert judged.pop("chosen") == 1
    assert len(judged) == 4
    assert not any(judged.values())
    for name in judged:
        manifest = json.loads((root / "runs/swept" / name / "manifest.json").read_text())
        assert "data.test" not in manifest["data"]
        assert not (root / "runs/swept" / name / "model").exists()
    assert isinstance(after[-1], Swept)
    assert set(after[-1].test) == {"loss", "accuracy", "f1"}
    assert (root / "runs/swept/chosen/model/model.safetensors").exists()


def test_points_share_one_cache(swept: tuple[Path, list[Event], list[Event]]) -> None:
    root = swept[0]
    stores = {path.name for path in (root / "runs/.cache").glob("[!.]*")}
    assert len(stores) == 4  # below the head and below the last block, of two splits each
    assert not list((root / "runs/swept").glob("**/.cache"))


def test_the_selected_recipe_is_one(swept: tuple[Path, list[Event], list[Event]]) -> None:
    root, _, after = swept
    assert isinstance(after[-1], Swept)
    path = after[-1].recipe
    assert path is not None
    loaded = load.load(path)
    assert loaded.recipe.data.splits.test == "test"
    facts = json.loads((root / "runs/swept/sweep.json").read_text())
    assert facts["chosen"] in path.read_text()
    assert {each["point"] for each in facts["rows"]} == {"head", "top-1"}


def test_the_page_can_do_nothing_but_be_read(swept: tuple[Path, list[Event], list[Event]]) -> None:
    root, _, after = swept
    assert isinstance(after[-1], Swept)
    text = after[-1].page.read_text()
    assert "<script" not in text
    assert "style=" not in text
    assert "top-1" in text
    payload = '"><img src=x onerror=alert(1)>'
    bad = Row(payload, payload, after[-1].curve.rows[0].outcomes, {payload: 0.5, "b": None})
    shown = Curve("accuracy", True, (bad, *after[-1].curve.rows), bad, bad)
    assert "<img" not in page(shown, {"accuracy": 0.5}, asked(root / "recipe.yaml"), root / "runs/swept")


def test_another_recipe_under_the_same_name_is_refused(swept: tuple[Path, list[Event], list[Event]]) -> None:
    root = swept[0]
    with pytest.raises(RunError, match="`--fresh` starts over"):
        list(sweep.sweep(asked(root / "recipe.yaml", overrides=("batch_size=4",)), "swept", root, root / "runs"))


def test_a_rate_that_breaks_is_an_outcome(tmp_path: Path) -> None:
    place(tmp_path)
    events = run(tmp_path, depths=("1",), rates=(1e38, 3e-3), seeds=1, overrides=("data.splits.test=",))
    broken, sound = (event for event in events if isinstance(event, Tried))
    assert "not finite" in broken.failed or "nan" in broken.failed
    assert not sound.failed
    assert isinstance(events[-1], Swept)
    assert events[-1].curve.rows[0].variant == "lr0.003"
    assert tried(run(tmp_path, depths=("1",), rates=(1e38, 3e-3), seeds=1, overrides=("data.splits.test=",))) == [
        ("top-1", 42, True),
        ("top-1", 42, True),
    ]


@pytest.mark.slow
def test_the_same_seconds_give_a_cheap_depth_more_steps(tmp_path: Path) -> None:
    place(tmp_path)
    more: dict[str, Any] = {"same": "seconds", "depths": ("0", "all"), "seeds": 1}
    events = run(tmp_path, **more)
    assert isinstance(events[-1], Swept)
    head, whole = events[-1].curve.rows
    assert head.steps > 12
    assert whole.steps == 6
    again = run(tmp_path, **more)  # measured once: the second time nothing is timed anew
    assert all(known for _, _, known in tried(again))


@pytest.mark.slow
def test_a_grid_over_keys(tmp_path: Path) -> None:
    place(tmp_path)
    over = ("stages.top.learning_rate=1e-3,3e-3", "batch_size=8,16")
    events = run(tmp_path, depths=(), rates=(), over=over, seeds=1)
    assert isinstance(events[-1], Swept)
    assert [row.point for row in events[-1].curve.rows] == [
        f"learning_rate-{rate}_batch_size-{size}" for rate in ("1e-3", "3e-3") for size in (8, 16)
    ]


# A search


def test_a_search_proposes_the_same_again() -> None:
    pytest.importorskip("optuna")
    spaces = points.overs(["a=1e-5..1e-2", "b=2..9", "c=x,y"])

    def proposals() -> list[dict[str, str]]:
        search, found = Search(spaces, 13), []
        for turn in range(12):
            found.append(search.ask())
            search.tell(None if turn == 3 else -abs(float(found[-1]["a"]) - 1e-3))
        return found

    first = proposals()
    assert first == proposals()
    assert all(1e-5 <= float(each["a"]) <= 1e-2 and 2 <= int(each["b"]) <= 9 for each in first)
    assert {each["c"] for each in first} == {"x", "y"}


def test_what_is_no_range_is_refused() -> None:
    pytest.importorskip("optuna")
    for word in ("a=1..b", "a=3..1", "a=1..2,5"):
        with pytest.raises(PlanError, match="is no range"):
            Search(points.overs([word]), 0)


def test_without_optuna_a_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(RunError, match="pip install optuna") as caught:
        Search({"a": ("1", "2")}, 0)
    assert caught.value.exit_code == ENVIRONMENT


def test_an_impossible_search_is_refused_before_anything_runs(tmp_path: Path) -> None:
    place(tmp_path)
    with pytest.raises(ProblemsError):
        run(tmp_path, depths=(), rates=(), over=("seed=1,2",))
    assert not list((tmp_path / "runs/swept").glob("*/metrics.jsonl"))
