"""What lies around: the recipes of a folder and the runs that came of them, one line each. It judges nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from engine import report
from engine.errors import ProblemsError, RunError
from engine.keeping.folder import differences
from engine.load import load


@dataclass(frozen=True)
class Entry:
    """A recipe, and the run that bears its name where there is one."""

    recipe: str
    """Its file, or nothing where only the run is left."""
    about: str
    run: str = ""
    state: str = ""
    result: str = ""
    time: str = ""


def entries(recipes: Iterable[Path], runs: Path) -> Iterator[Entry]:
    """Every recipe with its run, then every run whose recipe isn't among them."""
    known = {path.parent.name: path.parent for path in sorted(runs.glob("*/metrics.jsonl"))}
    for path in recipes:
        if not path.name.startswith("_"):
            yield _entry(str(path), _about(path), known.pop(path.stem, None))
    for path in known.values():
        yield _entry("", "", path)


def changes(old: Path, new: Path) -> list[str]:
    """What two recipes, or those of two runs, differ in: `key: old -> new`, defaults and `extends` filled in."""
    before, after = (
        load(path / "recipe.yaml" if path.is_dir() else path).recipe.model_dump(mode="json") for path in (old, new)
    )
    return [line.strip() for _, line in differences(before, after)]


def _about(path: Path) -> str:
    try:
        recipe = load(path).recipe
    except ProblemsError as error:
        return f"refused: {len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}, see `frostline check`"
    stages = recipe.stages
    said = (
        f"{len(stages)} stage{'s' if len(stages) > 1 else ''}" if isinstance(stages, tuple) else f"{stages.type} stages"
    )
    return f"{recipe.task.type}, {said}, {PurePath(recipe.model.path).name}"


def _entry(recipe: str, about: str, run: Path | None) -> Entry:
    if run is None:
        return Entry(recipe, about)
    try:
        papers = report.read(run)
    except RunError:
        return Entry(recipe, about, str(run), "can't be read")
    found = report.answer(papers)
    result = f"{found.metric} {report.metric(found.value)} ({found.split})" if found else ""
    seconds = sum(event["seconds"] for event in papers.of("stage_ended"))
    return Entry(recipe, about, str(run), report.state(papers), result, report.duration(seconds) if seconds else "")
