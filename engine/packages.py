"""Files that installed Python packages carry: `package:DISTRIBUTION/PATH`.

Looks at the metadata pip has written and nothing else: it imports no package, installs none and runs no code of one.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from engine.errors import ENVIRONMENT, Key, PlanError, Problem, RunError

PREFIX = "package:"


def locate(spec: str, key: Key = ()) -> Path:
    """The file or folder that `package:DISTRIBUTION/PATH` names; PATH starts where pip put the distribution's files.

    `key` is the recipe's key that `spec` stands at. Raises `PlanError` where the spec is malformed or the distribution
    has no such file, `RunError` where it isn't installed.
    """
    name, _, path = spec.removeprefix(PREFIX).partition("/")
    if not spec.startswith(PREFIX) or not name or not path:
        raise PlanError([Problem(key, f"`{spec}` names no file of a package", "write `package:DISTRIBUTION/PATH`")])
    if path.startswith("/") or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
        raise PlanError([Problem(key, f"`{spec}` leaves its package", "give a path inside it, without `..`")])
    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError) as error:
        raise RunError(f"the package {name} is not installed; run `pip install {name}`", ENVIRONMENT) from error
    return _inside(found, name, PurePosixPath(path), key)


def _inside(found: Distribution, name: str, path: PurePosixPath, key: Key) -> Path:
    carried = {str(place) for file in found.files or () for place in (file, *file.parents)}
    base = Path(str(found.locate_file(""))).resolve()
    place = (base / path).resolve()
    if str(path) in carried and place.exists() and place.is_relative_to(base):
        return place
    near = get_close_matches(str(path), sorted(carried), n=3, cutoff=0.4)
    hint = f"near: {', '.join(near)}" if near else "look at `pip show --files " + name + "`"
    raise PlanError([Problem(key, f"the package {name} carries no `{path}`", hint)])
