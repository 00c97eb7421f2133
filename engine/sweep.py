"""The honest curve over freeze depth, or over any key: every point an ordinary run, all of them on one shared cache.

The rate is tuned at every point by the first seed, the other seeds follow at the rate that won. What chooses is the
validation split alone: the recipes of points name no test split, and only the one that was selected is judged there,
once. Nothing is kept in memory between runs but what was measured, so a sweep that was cut short goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine import records, report, start, store
from engine.errors import GUARD, REFUSED, PlanError, Problem, RunError
from engine.keeping import durable
from engine.keeping.folder import RunFolder
from engine.load import Loaded, load
from engine.metrics import greater_is_better
from engine.records import Event, Note
from engine.sweeping import points, search
from engine.sweeping.curve import Curve, Outcome, Row, Swept, Tried, better, curve, speaks
from engine.sweeping.points import Base, Point, Variant

CHOSEN = "chosen"
"""The run of the recipe that was selected, and with `.yaml` that recipe."""
FAILED = "failed.txt"


@dataclass(frozen=True)
class Asked:
    """What a user wants swept."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    depths: tuple[str, ...] = ()
    """Depths to go through; all of them, or a handful, where none are named."""
    units: bool = False
    window: int = 0
    """Neighbouring blocks of a window; 0 for none."""
    rates: tuple[float, ...] = ()
    """Learning rates to try at each depth; three around the recipe's where none are named."""
    seeds: int = 3
    same: Literal["steps", "seconds"] = "steps"
    """What every depth gets as much of."""
    over: tuple[str, ...] = ()
    """`key=a,b` words: a grid over keys in place of depths."""
    trials: int = 0
    """Points that optuna proposes from what `over` allows, in place of a grid."""

    def name(self, recipe: str) -> str:
        """What a sweep of a recipe is called where nobody says."""
        return f"{recipe}-{'over' if self.over else 'sweep'}{'-seconds' if self.same == 'seconds' else ''}"


def asked(
    recipe: Path,
    overrides: Sequence[str],
    depths: str,
    units: bool,
    window: int,
    rates: Sequence[str],
    seeds: int,
    same: str,
    over: Sequence[str],
    search: str,
    trials: int,
) -> Asked:
    """What the words of a command line ask for; raises `PlanError` where they contradict each other."""
    words = tuple(word.strip() for word in depths.split(",") if word.strip())
    try:
        numbers = tuple(float(rate) for rate in rates)
    except ValueError:
        numbers = (0.0,)
    wrong = {
        f"`--same {same}` is none of `steps` and `seconds`": same not in ("steps", "seconds"),
        f"`--search {search}` is not known; `optuna` is": search not in ("", "optuna"),
        "`--search` looks among values of keys, and `--over` names none": search and not over,
        "`--learning-rates` has to be numbers above 0": any(not rate > 0 for rate in numbers),
        "`--over` takes the place of depths; leave one of them out": over and (words or units or window or numbers),
        "`--over` goes with `--same steps`, for its points may last as they like": over and same == "seconds",
    }
    if problems := [Problem((), sentence) for sentence, holds in wrong.items() if holds]:
        raise PlanError(problems)
    sameness: Literal["steps", "seconds"] = "seconds" if same == "seconds" else "steps"
    found = trials if search else 0
    return Asked(recipe, tuple(overrides), words, units, window, numbers, seeds, sameness, tuple(over), found)


def sweep(asked: Asked, name: str, root: Path, runs: Path, fresh: bool = False) -> Iterator[Event]:
    """Run what was asked into runs/<name>, as events; the last one holds the curve.

    Raises `RunError` where another sweep left its runs under that name, or where one process is not enough.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("a sweep runs in one process; launch it without `accelerate launch`", REFUSED)
    if not 1 <= asked.seeds <= 100:
        raise PlanError([Problem((), f"{asked.seeds} seeds are no sweep", "1 to 100 are; with 1 there is no interval")])
    with ExitStack() as held:
        held.enter_context(durable.lock(runs / name))
        yield from _Sweep(asked, runs / name, root, runs / store.FOLDER, fresh).events()


class _Sweep:
    """A sweep under way."""

    def __init__(self, asked: Asked, folder: Path, root: Path, cache: Path, fresh: bool):
        self.asked, self.folder, self.root, self.cache = asked, folder, root, cache
        self.loaded = load(asked.recipe, asked.overrides)
        self.recipe = self.loaded.recipe
        self.seeds = [self.recipe.seed + number for number in range(asked.seeds)]
        self.metric = ""
        self.points: dict[str, Point] = {}
        self.rows: dict[str, Row] = {}
        self.prints: dict[int, dict[str, str]] = {}
        """Seed -> the fingerprints of the rows that its runs train on and are judged by."""
        if fresh:
            _forget(folder)

    def events(self) -> Iterator[Event]:
        """Every point, then the choice, then what was selected on the test split."""
        if self.asked.over:
            yield from self._over()
        else:
            yield from self._depths()
        found = self._curve()
        test, recipe = {}, None
        if found.chosen:
            recipe = self._write_recipe(found)
            if self.recipe.data.splits.test:
                test = yield from self._judged(recipe)
        yield Swept(found, self._write(found, test), recipe, test)

    # Which points

    def _over(self) -> Iterator[Event]:
        if "seed" in (spaces := points.overs(self.asked.over)):
            raise PlanError([Problem((), "a sweep goes over seeds by itself", "`--seeds` says how many")])
        if not self.asked.trials:
            for point in points.grid(spaces):
                yield from self._point(point)
            return
        proposals = search.Search(spaces, self.recipe.seed)
        for _ in range(self.asked.trials):
            point = points.chosen(proposals.ask())
            yield from self._point(point)
            mean = self.rows[point.name].mean
            proposals.tell(None if mean is None else better(self._greater)(mean))

    def _depths(self) -> Iterator[Event]:
        drafted = start.draft(self._derived(_PLAIN, self.recipe.seed), self.root)
        base = Base(self.recipe, drafted.outline, drafted.plan)
        if base.new_head and not base.first:
            yield Note("the recipe has no stage for the head alone; each depth begins with one epoch of it at 1e-3")
        if not isinstance(self.recipe.data.splits.validation, str) and _held_out(drafted.rows):
            yield Note("no validation split is named, so each seed holds out other rows; intervals tell of that too")
        depths = points.opened(base, self.asked.depths, self.asked.units, self.asked.window)
        steps = None
        if self.asked.same == "seconds":
            steps = yield from self._fair_steps(base, depths)
        for point in points.depth_points(base, depths, self.asked.rates, steps):
            yield from self._point(point)

    def _fair_steps(self, base: Base, depths: Sequence[points.Opened]) -> Iterator[Any]:
        """How many steps of each depth take as long as the slowest depth's; measured once, and then on record."""
        seconds: dict[str, float] = {}
        for depth in depths:
            timing = points.timing_point(base, depth)
            outcome = yield from self._run(timing, timing.variants[0], self.recipe.seed)
            if not outcome.step_seconds:
                raise RunError(f"no step of {depth.name} could be timed: {outcome.failed or 'nothing is on record'}")
            seconds[depth.name] = outcome.step_seconds
        slowest = max(depths, key=lambda depth: seconds[depth.name])
        budget = points.length(base, slowest) * seconds[slowest.name]
        return {name: max(1, round(budget / took)) for name, took in seconds.items()}

    # What comes of them

    def _point(self, point: Point) -> Iterator[Event]:
        """Tune a point by the first seed, then run the other seeds as the best of its variants."""
        self.points[point.name], first = point, list[Outcome]()
        for variant in point.variants:
            first.append((yield from self._run(point, variant, self.seeds[0])))
        speaker = speaks(first, self._greater) or point.variants[0].name
        outcomes = [each for each in first if each.variant == speaker]
        (variant,) = (each for each in point.variants if each.name == speaker)
        for seed in self.seeds[1:] if not outcomes[0].failed else ():
            outcomes.append((yield from self._run(point, variant, seed)))
        tried = {each.variant: each.value for each in first}
        self.rows[point.name] = Row(point.name, speaker, tuple(outcomes), tried)
        self._write(self._curve(), {})

    def _run(self, point: Point, variant: Variant, seed: int) -> Iterator[Any]:
        """One run, or what is known of it; a run that a guard has stopped is an outcome as well."""
        name = "-".join(filter(None, (point.name, variant.name, f"s{seed}")))
        loaded, folder = self._derived(variant, seed), RunFolder(self.folder / name)
        if not (known := _over(folder, loaded)):
            try:
                for _ in start.run(loaded, name, self.root, self.folder, cache=self.cache):
                    pass
            except RunError as error:
                if error.exit_code != GUARD:
                    raise
                durable.replace(folder.path / FAILED, str(error).encode())
            except PlanError as error:
                error.source = loaded.source
                raise
            for path in (folder.checkpoints, folder.model, folder.adapter):
                if path.is_dir():
                    durable.retire(path)  # dozens of models would fill the disk; what was selected is trained again
        outcome = self._outcome(folder, point, variant, seed)
        yield Tried(point.name, variant.name, seed, self.metric, outcome.value, outcome.seconds, outcome.failed, known)
        return outcome

    def _derived(self, variant: Variant, seed: int) -> Loaded:
        blind = (points.WITHOUT_TEST,) if self.recipe.data.splits.test else ()
        return load(self.asked.recipe, (*self.asked.overrides, *variant.words, *blind, f"seed={seed}"))

    def _outcome(self, folder: RunFolder, point: Point, variant: Variant, seed: int) -> Outcome:
        papers = report.read(folder.path)
        self._same_rows(papers, seed)
        self.metric = self.metric or report.deciding(papers)
        ended = papers.of("stage_ended")
        failed = (folder.path / FAILED).read_text(encoding="utf-8") if (folder.path / FAILED).exists() else ""
        last = report.stages(papers)[-1]
        value = ended[-1]["metrics"].get(self.metric) if ended and not failed else None
        if value is None and not failed:
            failed = f"`{self.metric}` was not measured"
        outcome = Outcome(point.name, variant.name, seed, value, failed=failed)
        return replace(
            outcome,
            loss=ended[-1]["metrics"].get("loss") if ended else None,
            size=max(stage["size"] for stage in papers.plan["stages"]),
            steps=last.plan["steps"],
            seconds=sum(event["seconds"] for event in ended),
            step_seconds=last.seconds_per_step,
            peak_bytes=max((event["peak_bytes"] for event in ended), default=0) - last.base_bytes,
            flops=sum(stage["forecast"]["flops"] for stage in papers.plan["stages"]),
        )

    def _same_rows(self, papers: report.Papers, seed: int) -> None:
        """Raise `RunError` where points of one seed saw different rows: nothing could be said of them."""
        prints = {name: print for name, print in papers.manifest["data"].items() if name.startswith("data.")}
        if not self.asked.over and self.prints.setdefault(seed, prints) != prints:
            what = f"{papers.path} was trained or judged on other rows than the points before it"
            raise RunError(f"{what}; `--fresh` starts the sweep over", REFUSED)

    @property
    def _greater(self) -> bool:
        return greater_is_better(self.metric)

    def _curve(self) -> Curve:
        return curve(self.metric, self._greater, tuple(self.rows.values()))

    # What is left of it

    def _judged(self, recipe: Path) -> Iterator[Any]:
        """Run the selected recipe once more, with the test split, and return what it scores there."""
        folder = RunFolder(self.folder / CHOSEN)
        yield Note(f"{recipe} was selected; it is trained once more, to be judged on the test split")
        loaded = load(recipe)
        if folder.manifest.exists() and not _same(folder, loaded):
            folder.clear()
        yield from start.run(loaded, CHOSEN, self.root, self.folder, cache=self.cache)
        return report.read(folder.path).of("evaluated", split="test")[-1]["metrics"]

    def _write_recipe(self, found: Curve) -> Path:
        from engine.sweeping import sweeppage

        assert found.chosen is not None
        (variant,) = (v for v in self.points[found.chosen.point].variants if v.name == found.chosen.variant)
        path = self.folder / f"{CHOSEN}.yaml"
        loaded = load(self.asked.recipe, (*self.asked.overrides, *variant.words))
        durable.replace(path, sweeppage.recipe(loaded, found, self.asked.recipe, self.folder).encode())
        load(path)
        return path

    def _write(self, found: Curve, test: dict[str, float]) -> Path:
        """Keep the curve as sweep.json and sweep.html; returns the page."""
        from engine.sweeping import sweeppage

        facts = {"recipe": str(self.asked.recipe), "asked": asdict(self.asked), "test": test, **sweeppage.plain(found)}
        durable.replace(self.folder / "sweep.json", (json.dumps(facts, indent=1, default=str) + "\n").encode())
        page = self.folder / "sweep.html"
        durable.replace(page, sweeppage.page(found, test, self.asked, self.folder).encode())
        return page


_PLAIN = Variant("", ())


def _held_out(rows: Any) -> bool:
    return rows is not None and any("held out" in note for note in rows.notes)


def _over(folder: RunFolder, loaded: Loaded) -> bool:
    """Whether a point's run is over, well or not; raises `RunError` where another recipe asked for it."""
    ended = folder.metrics.exists() and any(event["event"] == "finished" for event in records.read(folder.metrics))
    if ended := ended or (folder.path / FAILED).exists():
        folder.refuse_changes(loaded.source.resolved, {}, sys.maxsize)
    return ended


def _same(folder: RunFolder, loaded: Loaded) -> bool:
    """Whether a run was asked by this very recipe."""
    try:
        folder.refuse_changes(loaded.source.resolved, {}, sys.maxsize)
    except RunError:
        return False
    return True


def _forget(folder: Path) -> None:
    """Take an earlier sweep away."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            durable.retire(path)
        elif path.name != "run.lock":
            path.unlink()
