"""The `frostline` command: what each command prints, and how errors become words and exit codes.

A user's mistake is told in one screen and never as a traceback; anything unforeseen stays a traceback. Commands import
what they need inside themselves, so that `check` answers like a compiler.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.arguments import one_recipe, recipes, run_name, split
from engine.errors import CRASH, REFUSED, EchoError, FrostlineError, PlanError, Problem, RecipeError
from engine.selftesting import selftest

if TYPE_CHECKING:
    from engine.errors import Source
    from engine.recipe import Recipe

app = typer.Typer(
    name="frostline",
    help="Fine-tune Hugging Face models by recipe: what stays frozen, what thaws, and when.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_caches = typer.Typer(no_args_is_help=True, help="Look at the activations that runs have kept, or take them away.")
app.add_typer(_caches, name="cache")
app.command()(selftest)


@app.callback()
def _frostline() -> None:
    """Fine-tune Hugging Face models by recipe: what stays frozen, what thaws, and when."""


@app.command()
def check(
    what: Annotated[list[str], typer.Argument(metavar="FILE_OR_FOLDER... [key=value ...]", show_default=False)],
) -> None:
    """Say whether recipes are right, as far as that can be said without their models."""
    paths, overrides = split(what)
    files = list(recipes(paths))
    if not files:
        raise RecipeError([_nothing(paths)])
    refused = [file for file in files if not _checked(file, overrides)]
    if refused:
        raise typer.Exit(REFUSED)


@app.command()
def plan(
    what: Annotated[list[str], typer.Argument(metavar="FILE [key=value ...]", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Print the stages as a list to paste into a recipe.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the plan into an SVG or PNG file as well.")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Draw it for a dark page.")] = False,
    examples: Annotated[int | None, typer.Option(help="Plan for so many examples, and leave the data alone.")] = None,
    data_root: Annotated[Path, typer.Option(help="The folder that local models and data lie in.")] = Path(),
) -> None:
    """Show what a recipe will do: who trains in which stage, at which rate, at what cost. No weights are read."""
    from engine import screen, start
    from engine.planning import thrift

    loaded, name = one_recipe(what)
    with placed(loaded.source):
        drafted = start.timed(start.draft(loaded, data_root, examples))
    if picture:
        screen.draw_plan(drafted.plan, picture, dark)
    if json:
        screen.print_json(drafted.plan)
    elif write:
        screen.print_stages(loaded.recipe, drafted.outline)
    else:
        notes = thrift.notes(loaded.recipe, drafted.plan, drafted.outline)
        screen.show_plan(screen.console(), name, drafted.plan, notes)


@app.command()
def run(
    what: Annotated[list[str], typer.Argument(metavar="FILE [key=value ...]", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the run; the recipe's own if left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, whatever an earlier run has left.")] = False,
    log_with: Annotated[str, typer.Option(metavar="TRACKER,...", help="Log to tensorboard, wandb, ... too.")] = "",
    runs: Annotated[Path, typer.Option(help="The folder that run folders lie in.")] = Path("runs"),
    data_root: Annotated[Path, typer.Option(help="The folder that local models and data lie in.")] = Path(),
) -> None:
    """Train a recipe into runs/<its name>; a run that was cut short goes on where it was."""
    from engine import tracking

    trackers = tracking.wanted(log_with)
    loaded, own_name = one_recipe(what)
    from engine import screen, start

    with placed(loaded.source):
        events = start.run(loaded, run_name(name or own_name), data_root, runs, fresh, log_with=trackers)
        screen.follow(screen.console(), events)


@app.command()
def sweep(
    what: Annotated[list[str], typer.Argument(metavar="FILE [key=value ...]", show_default=False)],
    depths: Annotated[str, typer.Option(help="Depths: numbers of blocks, `all`, `full`; or all of them.")] = "",
    units: Annotated[bool, typer.Option("--units", help="Each block by itself as well, and the embeddings.")] = False,
    windows: Annotated[int, typer.Option(min=0, help="So many neighbouring blocks at a time as well.")] = 0,
    learning_rates: Annotated[str, typer.Option(help="Rates to try at each depth; or three around its own.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each point.")] = 3,
    same: Annotated[str, typer.Option(help="What all depths get as much of: `steps` or `seconds`.")] = "steps",
    over: Annotated[list[str] | None, typer.Option(help="In place of depths: `key=a,b`; several make a grid.")] = None,
    search: Annotated[str, typer.Option(help="`optuna` searches what `--over` allows, `a..b` being a range.")] = "",
    trials: Annotated[int, typer.Option(min=1, help="Points of a search.")] = 20,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; the recipe's and `-sweep` if left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, whatever an earlier sweep has left.")] = False,
    runs: Annotated[Path, typer.Option(help="The folder that run folders lie in.")] = Path("runs"),
    data_root: Annotated[Path, typer.Option(help="The folder that local models and data lie in.")] = Path(),
) -> None:
    """Draw the curve over freeze depth, or any key: rates tuned, seeds repeated, the smallest good point selected."""
    from engine import screen
    from engine.sweep import asked
    from engine.sweep import sweep as events

    loaded, own_name = one_recipe(what)
    (file,), overrides = split(what)
    rates = learning_rates.split(",") if learning_rates else []
    wanted = asked(file, overrides, depths, units, windows, rates, seeds, same, over or [], search, trials)
    with placed(loaded.source):
        screen.follow_sweep(
            screen.console(), events(wanted, run_name(name or wanted.name(own_name)), data_root, runs, fresh)
        )


@app.command()
def advise(
    what: Annotated[list[str], typer.Argument(metavar="FILE [key=value ...]", show_default=False)],
    budget: Annotated[str, typer.Option(help="Time it may take; or `25%`, of one full fine-tuning.")] = "10m",
    min_gain: Annotated[float, typer.Option(help="Gain in points that unfreezing has to be worth.")] = 0.5,
    rows: Annotated[int, typer.Option(min=20, help="Rows to look at, at most.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Decides folds, orders and resamples.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the advice; the recipe's own if left out.")] = None,
    runs: Annotated[Path, typer.Option(help="The folder that run folders lie in.")] = Path("runs"),
    data_root: Annotated[Path, typer.Option(help="The folder that local models and data lie in.")] = Path(),
) -> None:
    """Measure whether to unfreeze, which layers and when, on your own rows, and write the recipe."""
    from engine import screen
    from engine.advise import ENDING, advise
    from engine.advising import telling
    from engine.advising.budget import Budget

    loaded, own_name = one_recipe(what)
    called, allowed = run_name(name or own_name), Budget.read(budget)
    with placed(loaded.source):
        events = advise(loaded, called, data_root, runs, allowed, seed, min_gain / 100, rows)
        telling.follow(screen.console(), events, runs / f"{called}{ENDING}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_FOLDER...", show_default=False)],
    to: Annotated[Path, typer.Option(help="Where a comparison of several runs goes.")] = Path("comparison.html"),
) -> None:
    """Write the report of a run anew, or one page that compares two to four runs; prints the file's name."""
    from engine import report as reports
    from engine.reporting import comparison

    print(reports.write(runs[0]) if len(runs) == 1 else comparison.write(runs, to))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", show_default=False)],
    to: Annotated[str, typer.Option(help="`safetensors`, `adapter`, `torch` or `onnx`.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; RUN_FOLDER/export/<to> if left out.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With ONNX: in int8 as well, and what that costs.")] = False,
    push_to_hub: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Send it there; made private if new.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
    data_root: Annotated[Path, typer.Option(help="The folder that local data lie in.")] = Path(),
) -> None:
    """Hand on a finished run: its weights, its adapters, or weights and graph in one file; with a model card."""
    from engine.shipping import upload

    if push_to_hub:
        upload.refuse_name(push_to_hub)
    elif dry_run:
        raise typer.BadParameter("--dry-run says what --push-to-hub would send; name a repository")
    from engine.export import export as write

    folder, said = write(run, to, out, int8, data_root)
    print(*said, folder, *(upload.listed(folder) if push_to_hub else ()), sep="\n")
    if push_to_hub and not dry_run:
        print(upload.push(folder, push_to_hub))


@app.command()
def init(
    model: Annotated[str, typer.Option(help="A model of the Hub, or a local folder.")],
    task: Annotated[str, typer.Option(help="What to fine-tune for: a pipeline tag of the Hub.")],
    data: Annotated[str, typer.Option(help="A data set of the Hub, or a local file or folder.")],
    to: Annotated[Path, typer.Option(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a first recipe, commented and checked, to be edited."""
    from engine import drafting

    print(drafting.write(model, task, data, to))
    print("next: {}, then {}".format(*drafting.following(model, data, to)), file=sys.stderr)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    tool: Annotated[str, typer.Option("--from", help="The tool, where the file doesn't tell by itself.")] = "",
    model: Annotated[str, typer.Option(help="The model, in place of the file's own.")] = "",
    task: Annotated[str, typer.Option(help="The task: a pipeline tag of the Hub.")] = "",
    data: Annotated[str, typer.Option(help="The data, in place of the file's own.")] = "",
    devices: Annotated[int, typer.Option(min=1, help="Devices that the other tool trained on.")] = 1,
    to: Annotated[Path | None, typer.Option(help="The recipe to write; it is printed if left out.")] = None,
) -> None:
    """Turn a config of axolotl, LLaMA-Factory, ms-swift or finetuning-scheduler into a recipe."""
    from engine import importing

    imported = importing.carry(file, tool, importing.Given(model, task, data, devices))
    for note in imported.notes:
        print(_coloured(str(note)), file=sys.stderr)
    print(importing.write(imported, to) if to else imported.text, end="\n" if to else "")


@app.command()
def ls(
    what: Annotated[list[Path] | None, typer.Argument(metavar="FILE_OR_FOLDER...", show_default="recipes")] = None,
    runs: Annotated[Path, typer.Option(help="The folder that run folders lie in.")] = Path("runs"),
) -> None:
    """List recipes and what came of their runs."""
    from engine import listing, screen

    screen.show_entries(screen.console(), listing.entries(recipes(what or [Path("recipes")]), runs))


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="FILE_OR_RUN_FOLDER", show_default=False)],
    new: Annotated[Path, typer.Argument(metavar="FILE_OR_RUN_FOLDER", show_default=False)],
) -> None:
    """Say what two recipes differ in, or the recipes of two runs."""
    from engine import listing
    from engine.grammar.source import clean

    print("\n".join(map(clean, listing.changes(old, new))) or "They say the same.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from engine.grammar.schema import schema

    print(json.dumps(schema(), indent=2))


@_caches.command("ls")
def cache_ls(
    runs: Annotated[Path, typer.Option(help="The folder that run folders lie in.")] = Path("runs"),
) -> None:
    """List what is kept: of which model, at which modules, how large, and when it was last used."""
    from engine import screen, store

    folder = runs / store.FOLDER
    screen.show_kept(screen.console(), folder, store.listed(folder), store.usage(folder))


@_caches.command("clear")
def cache_clear(
    runs: Annotated[Path, typer.Option(help="The folder that run folders lie in.")] = Path("runs"),
    keep: Annotated[float, typer.Option(min=0, help="Gigabytes of what was used last that may stay.")] = 0.0,
) -> None:
    """Take away what is kept; a run that needs it computes it anew, and one that is under way reads on."""
    from engine import store
    from engine.reporting.picture import weight

    folder = runs / store.FOLDER
    before = store.usage(folder)
    store.evict(folder, round(keep * 1e9)) if keep else store.clear(folder)
    after = store.usage(folder)
    print(f"{folder}: {weight(before - after)} freed, {weight(after)} left")


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def supervise(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", show_default=False)],
    max_restarts: Annotated[int, typer.Option(min=0, help="How often it may be started again.")] = 10,
    pause: Annotated[float, typer.Option(min=0, help="Seconds before each restart: the other hosts end as well.")] = 10,
) -> None:
    """Start `accelerate launch ...` again where a process was lost; what a restart can't cure ends it."""
    from engine.supervise import supervise

    raise typer.Exit(supervise(command, max_restarts, pause))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    from engine.supervise import ended, enrol

    try:
        enrol()
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()
    except FrostlineError as error:
        if not isinstance(error, EchoError):
            tell(error)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CRASH
    except Exception as error:
        # A wrong command line: typer's own error, whose class it keeps to itself.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            raise
        show()
    ended(code or 0)
    raise SystemExit(code or 0)


@contextmanager
def placed(source: Source) -> Iterator[None]:
    """A recipe that doesn't fit its model or data is told with the place of each key."""
    try:
        yield
    except PlanError as error:
        error.source = source
        raise


def tell(error: FrostlineError) -> None:
    """An error in words on standard error."""
    from engine.grammar.source import clean

    source = error.source if isinstance(error, RecipeError | PlanError) else None
    text = source.render(error.problems) if source and isinstance(error, RecipeError | PlanError) else str(error)
    for line in text.splitlines():
        print(_coloured(clean(line)), file=sys.stderr)


def _checked(file: Path, overrides: Sequence[str]) -> bool:
    """Check one recipe and print what came of it."""
    from engine.grammar.source import clean
    from engine.load import load, scan

    try:
        if file.name.startswith("_"):
            scan(file)
            print(clean(f"{file}  ok: a part of recipes"))
        else:
            print(clean(f"{file}  ok: {_summary(load(file, overrides).recipe)}"))
    except RecipeError as error:
        tell(error)
        return False
    return True


def _summary(recipe: Recipe) -> str:
    stages = recipe.stages
    if not isinstance(stages, tuple):
        return f"{recipe.task.type}, {stages.type} stages"
    return f"{recipe.task.type}, {len(stages)} stage{'s' if len(stages) > 1 else ''}"


def _nothing(paths: Sequence[Path]) -> Problem:
    where = f"there is no recipe in {', '.join(f'`{path}`' for path in paths)}" if paths else "no file is named"
    return Problem((), where, "name a YAML file, or a folder that holds some")


def _coloured(line: str) -> str:
    """The place of a problem dimmed, where a person reads it."""
    place, gap, rest = line.partition("  ")
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or not gap
    return line if plain else f"\x1b[2m{place}\x1b[0m{gap}{rest}"


if __name__ == "__main__":
    main()
