"""The house rules that a test can hold: where arrows point, what stays torch-free, what is written in one place."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "engine"
FILES = sorted(ENGINE.rglob("*.py"))

FLOORS = """
0 errors part outline patterns records metrics packages randomness adapters prompts tasks schedules
0 grammar/names advising/budget
1 recipe load grammar
2 plan planning supervise advising/units advising/answers advising/advice sweeping/points sweeping/curve sweeping/search
3 models modelling data rows freezing optim frostline frost store checkpoint keeping devices
4 learner judging train start screen tracking keeping/folder keeping/position devices/shortage
4 signals advise advising sweep sweeping selftest report reporting export shipping listing drafting importing
5 cli arguments selftesting run
"""
"""From the ground up: a module imports from its own floor and those below it, and is on its folder's unless named."""
HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft", "sklearn", "matplotlib")
WORKSHOPS = {"tasks", "schedules", "signals", "importing"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
KEYS = "model task data freeze adapters stages training batch_size per_device_batch_size evaluation cache seed"
COMMANDS = "check plan run sweep advise report export init import ls diff schema cache supervise selftest"


def label(file: Path) -> str:
    return file.relative_to(ENGINE).with_suffix("").as_posix()


every_file = pytest.mark.parametrize("file", FILES, ids=label)


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[str]:
    """Full names of the modules a file imports, at its top or inside a function; `from a import b` gives a and a.b."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(file)}:{node.lineno} imports by dots; write engine.<module>"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module: str) -> int:
    """The floor of a module, as in `frost/tracing`."""
    floors = {name: int(number) for number, *names in map(str.split, FLOORS.strip().splitlines()) for name in names}
    found = floors.get(module, floors.get(module.split("/")[0]))
    assert found is not None, f"engine/{module} has no floor yet; add it to FLOORS in {Path(__file__).name}"
    return found


def modules(file: Path) -> set[str]:
    """What of engine/ a file imports, but for folders whose own file imports nothing."""
    named = {name.removeprefix("engine.").replace(".", "/") for name in imports(file) if name.startswith("engine.")}
    homes = {name: ENGINE / name / "__init__.py" for name in named}
    folders = {name for name, home in homes.items() if home.exists() and any(imports(home))}
    return folders | {name for name in named if (ENGINE / f"{name}.py").exists()}


def light_modules() -> list[str]:
    return [
        "engine." + label(file).removesuffix("/__init__").replace("/", ".")
        for file in FILES
        if file.parent != ENGINE or file.stem != "__init__"
        if floor(label(file)) <= 2
    ]


@every_file
def test_arrows_point_down(file: Path) -> None:
    own = label(file)
    if own == "__init__":
        assert not list(imports(file)), "engine/__init__.py imports nothing, or everything would import it"
        return
    up = sorted(module for module in modules(file) if floor(module) > floor(own))
    assert not up, f"{own} (floor {floor(own)}) imports from above: {up}"


def test_floors_0_to_2_are_free_of_torch() -> None:
    code = f"import sys, {', '.join(light_modules())}; print(*(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stdout + done.stderr


def test_command_line_starts_free_of_torch() -> None:
    code = f"import sys, engine.cli; print(*(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stdout + done.stderr


@every_file
def test_small_enough_to_read(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: length for node in functions if (length := (node.end_lineno or 0) - node.lineno + 1) > 60}
    assert not long


@every_file
def test_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(tree(file)), f"{label(file)} has no module docstring"


def writes_requires_grad(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return node.attr == "requires_grad"
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr == "requires_grad_":
        return True
    named = isinstance(node.func, ast.Name) and node.func.id == "setattr"
    return named and any(isinstance(part, ast.Constant) and part.value == "requires_grad" for part in node.args)


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("p.requires_grad = True", True),
        ("p.requires_grad_(False)", True),
        ("setattr(p, 'requires_grad', True)", True),
        ("a = p.requires_grad", False),
    ],
)
def test_finds_what_writes_requires_grad(code: str, writes: bool) -> None:
    assert any(map(writes_requires_grad, ast.walk(ast.parse(code)))) is writes


@every_file
def test_requires_grad_is_written_in_one_file(file: Path) -> None:
    lines = [node.lineno for node in ast.walk(tree(file)) if writes_requires_grad(node)]  # pyright: ignore
    assert bool(lines) is (label(file) == "freezing"), lines


def forbidden(node: ast.AST) -> str | None:
    """What of a node would run code from a file, or open the door to it."""
    if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
        return node.arg if (node.arg, node.value.value) in OPEN_DOORS else None
    if not isinstance(node, ast.Call):
        return None
    call = ast.unparse(node.func)
    return call if call in {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.loads"} else None


OPEN_DOORS = {("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True), ("shell", True)}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("eval('1')", "eval"),
        ("torch.load(f)", "torch.load"),
        ("np.load(f, allow_pickle=True)", "allow_pickle"),
        ("model.eval()", None),
        ("np.load(f)", None),
    ],
)
def test_finds_what_is_forbidden(code: str, found: str | None) -> None:
    assert next(filter(None, map(forbidden, ast.walk(ast.parse(code)))), None) == found


@every_file
def test_nothing_runs_code_from_a_file(file: Path) -> None:
    assert not [found for node in ast.walk(tree(file)) if (found := forbidden(node))]
    assert not PICKLES & {name.split(".")[0] for name in imports(file)}


@every_file
def test_mistakes_have_a_class_of_their_own(file: Path) -> None:
    raised = [node.exc for node in ast.walk(tree(file)) if isinstance(node, ast.Raise) and node.exc]
    names = [ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raised]
    assert not {"Exception", "BaseException", "RuntimeError"} & set(names), "say it with a class of engine/errors.py"


def test_no_module_hides_another() -> None:
    """`accelerate launch engine/run.py` puts engine/ first on the path."""
    ours = {path.stem for path in ENGINE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }
    hidden = ours & (sys.stdlib_module_names | set(packages_distributions()))
    assert not hidden


def parts() -> list[type]:
    from engine.part import Part

    for name in light_modules():
        importlib.import_module(name)
    found, queue = [], [Part]
    while queue:
        found.append(queue.pop())
        queue.extend(found[-1].__subclasses__())
    return [part for part in found if part.__module__.startswith("engine.")]


def test_every_key_is_explained() -> None:
    found = parts()
    assert len(found) > 10
    silent = [
        f"{part.__name__}.{name}"
        for part in found
        for name, field in part.model_fields.items()  # pyright: ignore[reportAttributeAccessIssue]
        if name != "type" and not field.description
    ]
    assert not silent
    assert not [part.__name__ for part in found if not part.__doc__]


def test_readme_shows_the_house() -> None:
    blocks = re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    houses = [block for block in blocks if "engine/" in block and "recipe.py" in block]
    assert len(houses) == 1, "README.md shows the tree of engine/ in one fenced block"
    rooms = list(ENGINE.iterdir())
    rooms += [file for file in FILES if file.parent.parent == ENGINE and file.parent.name not in WORKSHOPS]
    names = [path.name + "/" * path.is_dir() for path in rooms if not path.name.startswith("__")]
    assert not [name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}", houses[0])]


def test_public_names_stay() -> None:
    """A recipe and a command of today must work tomorrow: taking one away is a decision, never an accident."""
    from engine.cli import app
    from engine.recipe import Recipe

    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert not set(KEYS.split()) - set(Recipe.model_fields)
    assert not set(COMMANDS.split()) - commands
