"""What a user is told when something is wrong: the place, the key, what is wrong, what to do next.

Every mistake of a user ends in one of three exceptions. A recipe that can't be read is a `RecipeError`; one that
doesn't fit its model or its data is a `PlanError`; anything that stops a run is a `RunError`. Never a bare `Exception`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

Key = tuple[str | int, ...]
"""The path of a key in the recipe, e.g. `("stages", 1, "unfreeze", 0)`; `()` is the recipe as a whole."""

DONE, CRASH, REFUSED, ENVIRONMENT, LOCKED, GUARD, NOTHING_TO_RESUME = range(7)
"""Exit codes 0 to 6; 2 is a refused recipe, 3 a disk or an environment, 5 a guard that stopped a run."""

STOPPED = 143
"""Exit code of a run that a signal has stopped in good order: 128 + SIGTERM, as a shell has it."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe."""

    key: Key
    """The key it stands at."""
    what: str
    """What is wrong, in the user's words."""
    next: str = ""
    """What to do about it."""

    @property
    def sentence(self) -> str:
        return f"{self.what}; {self.next}" if self.next else self.what


class Source(Protocol):
    """Knows where in which file each key of a recipe was written."""

    def render(self, problems: Iterable[Problem]) -> str:
        """The problems as a user reads them: `file:line:column  key: sentence`, one a line."""
        ...


class FrostlineError(Exception):
    """The root of what a user is told; a command turns it into words and an exit code, never a traceback."""

    exit_code: int = CRASH


class ProblemsError(FrostlineError):
    """One or more problems of a recipe, and the source that knows where they stand."""

    exit_code = REFUSED

    def __init__(self, problems: Iterable[Problem], source: Source | None = None):
        self.problems = tuple(problems)
        self.source = source
        super().__init__("\n".join(problem.sentence for problem in self.problems))


class RecipeError(ProblemsError):
    """The file is not a recipe: every problem of it at once."""


class PlanError(ProblemsError):
    """The recipe doesn't fit the model or the data: every problem of it at once."""


class RunError(FrostlineError):
    """Something stopped a run: one sentence, and the exit code that says of which kind."""

    def __init__(self, sentence: str, exit_code: int = GUARD):
        super().__init__(sentence)
        self.exit_code = exit_code


class EchoError(RunError):
    """What the main process of a run tells: every other one ends with the same exit code, and in silence."""
