"""The time that advice may take: how it is written, what is left of it, and what each rung has cost."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import REFUSED, RunError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
FINALISTS = 0.5
"""Share of the budget that finalists get at least: they decide, so whatever is dropped is dropped before."""
LATE = 1.05
"""A run that is under way may end so much later than the budget says; beyond, it is given up."""


class OutOfTimeError(Exception):
    """The budget is spent, or a signal has asked to stop: what has been measured so far has to do."""


@dataclass(frozen=True)
class Budget:
    """What a user allows: seconds, or a share of one full fine-tuning, whose price is measured first."""

    seconds: float | None
    share: float | None = None

    @classmethod
    def read(cls, text: str) -> Budget:
        """`90s`, `10m`, `1.5h` or `25%`. Raises `RunError` for anything else."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|%)", text.strip())
        if not found or not float(found[1]):
            sentence = f"`--budget {text}` is no time; write `10m`, `90s`, `1h`, or `25%` of one full fine-tuning"
            raise RunError(sentence, REFUSED)
        number = float(found[1])
        return cls(None, number / 100) if found[2] == "%" else cls(number * _UNITS[found[2]])

    @property
    def said(self) -> str:
        """The budget as a user would write it."""
        if self.share is not None:
            return f"{self.share:.0%} of one full fine-tuning"
        return f"{self.seconds:,.0f} s"


@dataclass
class Clock:
    """Time since advice began."""

    seconds: float = float("inf")
    """The budget; without end until a share of a full fine-tuning has been worked out."""
    now: Callable[[], float] = time.perf_counter
    """Wall-clock time, or that of the processor where others want it too."""
    stopped: bool = False
    """Whether a signal has asked to stop."""

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.began

    @property
    def left(self) -> float:
        return 0.0 if self.stopped else self.seconds - self.spent

    def check(self) -> None:
        """Raises `OutOfTimeError` where a signal has come or a run goes far beyond the budget."""
        if self.stopped or self.spent > self.seconds * LATE:
            raise OutOfTimeError
