"""Every recipe in recipes/ is a test: it loads, it plans, and (slow) it trains."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from engine.errors import ENVIRONMENT, RunError
from engine.load import Loaded, load
from engine.plan import Plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith("_"))

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module", autouse=True)
def questions() -> None:
    """The data of the recipes that read data/, and a model in it, made once from installed packages."""
    sys.path.append(str(ROOT / "scripts"))
    import _digits
    import _questions

    _questions.prepare(ROOT / "data")
    _digits.prepare(ROOT / "data")


def test_there_are_recipes() -> None:
    assert "trec" in {path.stem for path in RECIPES}


def test_the_page_about_recipes_is_current() -> None:
    """Every recipe names its source and says when to use it and when not; every key has its docstring."""
    import handbook

    text = handbook.text()
    assert text == (ROOT / "recipes/README.md").read_text(encoding="utf-8"), "run `python scripts/handbook.py`"
    assert all(f"]({path.name})" in text for path in RECIPES)
    assert all(f"### {handbook.name_of(part)}" in text for part in (*handbook.TASKS, *handbook.SCHEDULES))


def test_hooks_check_recipes_and_nothing_else() -> None:
    """What `.pre-commit-hooks.yaml` offers to other repositories."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for hook in hooks] == ["frostline-check", "frostline-check-installed"]
    for hook in hooks:
        assert hook["entry"] == "frostline check"
        taken = re.compile(hook["files"])
        assert all(taken.search(path.relative_to(ROOT).as_posix()) for path in RECIPES)
        assert not taken.search("recipes/recipe.schema.json")
        assert not taken.search(".github/workflows/recipes.yaml")


@every_recipe
def test_loads(recipe: Path) -> None:
    assert load(recipe).recipe.model.path
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json", "editors complete keys by this line"


@every_recipe
def test_plans(recipe: Path) -> None:
    loaded = load(recipe)
    plan = drafted(loaded, examples=1_000)
    assert all(stage.steps > 0 and stage.size > 0 for stage in plan.stages)


@pytest.mark.slow
@every_recipe
def test_trains_two_steps_a_stage(recipe: Path, tmp_path: Path) -> None:
    from engine import start
    from engine.records import Evaluated

    drafted(load(recipe))
    loaded = load(recipe, two_steps(load(recipe)))
    events = list(start.run(loaded, recipe.stem, ROOT, tmp_path))
    judged = {event.stage for event in events if isinstance(event, Evaluated)}
    assert judged == {stage.name for stage in drafted(loaded).stages}
    assert (tmp_path / recipe.stem / "metrics.jsonl").stat().st_size > 0


def two_steps(loaded: Loaded) -> list[str]:
    """The overrides that make every stage two steps long."""
    stages = loaded.recipe.stages
    keys = [f"stages.{stage.name}" for stage in stages] if isinstance(stages, tuple) else ["stages"]
    return [f"{key}.{length}" for key in keys for length in ("epochs=null", "steps=2")]


def drafted(loaded: Loaded, examples: int | None = None) -> Plan:
    """The plan; for so many `examples` where the data lie on the Hub and not in the local cache.

    A recipe is skipped where its model isn't there either, or where there is no number of examples to go by.
    """
    from engine import start

    if (path := loaded.recipe.model.path).startswith("data/") and not (ROOT / path).is_dir():
        pytest.skip(f"{path} is made by a script that has not been run here")
    try:
        return start.draft(loaded, ROOT).plan
    except RunError as error:
        at_home = "package:" in loaded.recipe.model.path and "data_files" in loaded.recipe.data.model_fields_set
        if error.exit_code != ENVIRONMENT or at_home:
            raise
        if examples and "package:" in loaded.recipe.model.path:
            return start.draft(loaded, ROOT, examples).plan
        pytest.skip(str(error))
