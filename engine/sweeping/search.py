"""A search over keys of a recipe by optuna, in place of a grid: it proposes values and is told what came of them.

Its proposals follow from the seed and from what it was told, so that a search that was cut short proposes the same
again. It runs nothing and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import ENVIRONMENT, PlanError, Problem, RunError

RANGE = ".."
"""Between the ends of a range, as in `1e-5..1e-3`."""
LOGARITHMIC = 10.0
"""From this ratio of its ends on a range is searched by orders of magnitude."""


class Search:
    """Proposes one value for each key at a time (TPE, Bergstra et al. 2011)."""

    def __init__(self, spaces: Mapping[str, Sequence[str]], seed: int):
        """`spaces` holds the values of each key, or one range. Raises `RunError` where optuna is missing."""
        try:
            import optuna
        except ImportError as error:
            what = "`--search optuna` needs optuna, which is not installed"
            raise RunError(f"{what}; `pip install optuna`, or leave the option out for a grid", ENVIRONMENT) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.spaces = {key: _space(optuna, key, values) for key, values in spaces.items()}
        self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
        self.failed = optuna.trial.TrialState.FAIL
        self.trial: Any = None

    def ask(self) -> dict[str, str]:
        """A value for each key, as a user would write it."""
        self.trial = self.study.ask(self.spaces)
        return {key: _written(value) for key, value in self.trial.params.items()}

    def tell(self, value: float | None) -> None:
        """What came of the last proposal: more is better, None where it failed."""
        self.study.tell(self.trial, value, state=self.failed if value is None else None)


def _space(optuna: Any, key: str, values: Sequence[str]) -> Any:
    """The optuna distribution of a list of values, or of a range."""
    if not any(RANGE in value for value in values):
        return optuna.distributions.CategoricalDistribution(list(values))
    try:
        ((low, high),) = (value.split(RANGE) for value in values)
        if low.strip().isdecimal() and high.strip().isdecimal():
            return optuna.distributions.IntDistribution(int(low), int(high))
        ends = float(low), float(high)
        wide = ends[0] > 0 and ends[1] / ends[0] >= LOGARITHMIC
        return optuna.distributions.FloatDistribution(*ends, log=wide)
    except ValueError as error:
        what = f"`{key}={','.join(values)}` is no range"
        raise PlanError(
            [Problem((), what, "write `key=1e-5..1e-3`, the lower end first, or values with commas")]
        ) from error


def _written(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
