"""`init`, `ls` and `diff`: what they write and say about recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import running
import tiny
from test_export_tasks import PLACES
from test_recipes import two_steps

from engine import drafting, listing, load, start
from engine.cli import main
from engine.errors import RecipeError
from engine.records import Evaluated, StageStarted
from engine.tasks import TASKS

TOLD = {
    "translation": ("task.source_lang=en", "task.target_lang=de"),
    "question-answering": ("task.stride=4",),
}
"""What only whoever has the data can say, and what a model of 32 tokens needs."""
NAMES = [task.model_fields["type"].annotation.__args__[0] for task in TASKS]


def says(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("data", ["stanfordnlp/imdb", "data/rows.csv", "rows.jsonl", 'it\'s: a "folder"'])
@pytest.mark.parametrize("task", NAMES)
def test_every_task_gets_a_recipe_that_passes_check(tmp_path: Path, task: str, data: str) -> None:
    recipe = load.load(drafting.write("some/model", task, data, tmp_path / "new/recipe.yaml")).recipe
    assert recipe.task.type == task
    assert recipe.model.path == "some/model"
    assert data in (recipe.data.path, *dict(recipe.data.data_files or {}).values())


@pytest.mark.parametrize(
    "model", ["null", "1e3", "a: b", "- a", "#x", "package:a/b", "~", "no", "true", "a #b", "é", "a\n: b"]
)
def test_any_name_stays_itself(tmp_path: Path, model: str) -> None:
    recipe = load.load(drafting.write(model, "text-classification", "d", tmp_path / "r.yaml")).recipe
    assert recipe.model.path == model


def test_what_init_writes_plans_and_trains(tmp_path: Path) -> None:
    root = running.place(tmp_path)
    tiny.write_jsonl(root / "all.jsonl", tiny.reviews(40))
    path = drafting.write("model", "text-classification", "all.jsonl", root / "first.yaml")
    plan = start.draft(load.load(path), root).plan
    assert [stage.name for stage in plan.stages] == ["head", "top"]
    assert plan.stages[0].size < plan.stages[1].size < plan.size


@pytest.mark.slow
@pytest.mark.parametrize("task", NAMES)
def test_what_init_writes_trains_two_steps_a_stage(
    tmp_path: Path, task: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is written, but for the length of its stages and of a batch."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    PLACES[task](tmp_path)
    path = drafting.write("model", task, "rows", tmp_path / "first.yaml")
    loaded = load.load(path, [*two_steps(load.load(path)), "batch_size=4", *TOLD.get(task, ())])
    happened = list(start.run(loaded, "first", tmp_path, tmp_path / "runs"))
    stages = [stage.name for stage in loaded.recipe.stages]
    assert [event.stage for event in running.events(happened, StageStarted)] == stages
    assert {event.stage for event in running.events(happened, Evaluated)} == set(stages)
    assert (tmp_path / "runs/first/model/config.json").is_file()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        drafting.write("m", "text-classification", "d", path)
    assert path.read_text() == "mine"


def test_command_names_the_task_that_was_meant(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--model", "m", "--data", "d", "--to", str(tmp_path / "r.yaml"))
    assert says(capsys, "init", "--task", "text-clasification", *words) == (
        2,
        "",
        "there is no task `text-clasification`; did you mean `text-classification`?\n",
    )
    assert says(capsys, "init", "--task", "text-classification", *words)[:2] == (0, f"{tmp_path / 'r.yaml'}\n")


def test_diff_says_what_changes_and_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = {"model": "m", "task": "text-classification", "data": "d"}
    other = {**plain, "model": {"path": "m"}, "batch_size": 32, "seed": 7, "evaluation": {"metric": "f1"}}
    for name, recipe in (("a", plain), ("b", other)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
    code, out, _ = says(capsys, "diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))
    assert (code, sorted(out.splitlines())) == (0, ["evaluation.metric: None -> 'f1'", "seed: 42 -> 7"])
    assert says(capsys, "diff", *[str(tmp_path / "a.yaml")] * 2)[1] == "They say the same.\n"


def test_ls_lists_recipes_runs_and_what_is_refused(tmp_path: Path) -> None:
    root = running.place(tmp_path)
    running.run(root, evaluation="accuracy")
    (root / "broken.yaml").write_text("model: m\n")
    found = list(listing.entries([root / "broken.yaml", root / "recipe.yaml", root / "_part.yaml"], root / "runs"))
    assert [Path(entry.recipe).name for entry in found] == ["broken.yaml", "recipe.yaml"]
    assert found[0].about.startswith("refused: 2 problems")
    assert (found[1].state, found[1].about) == ("finished", "text-classification, 1 stage, model")
    assert found[1].result.startswith("accuracy 0.")
    alone = list(listing.entries([], root / "runs"))
    assert [(entry.recipe, entry.state) for entry in alone] == [("", "finished")]


def test_init_answers_without_torch(tmp_path: Path) -> None:
    code = "import sys, engine.drafting; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
