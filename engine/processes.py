"""What the processes of a run must agree on: how many they are, and what the first of them has found.

A process that fails alone leaves the others waiting for it, so whatever one of them does for all, all of them learn how
it went before anyone goes on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object

from engine.errors import REFUSED, RunError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=5)
"""How long a process waits for another before the run ends; the default of half an hour hides a dead one."""


def launched() -> Accelerator:
    """The accelerator, once it agrees with the launcher about the number of processes.

    Raises `RunError` where they disagree: every process would believe it is alone, or one would do the work of many.
    """
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        sentence = f"the launcher started {asked} processes and accelerate counts {accelerator.num_processes}"
        raise RunError(f"{sentence}; on CPUs use `accelerate launch --multi_gpu --num_processes {asked}`", REFUSED)
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        sentence = "`accelerate launch --cpu --num_processes N` starts one process, whatever N is"
        raise RunError(f"{sentence}; use `--multi_gpu --num_processes N`, which runs on CPUs as well", REFUSED)
    return accelerator


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on the main process; every process gets its value, or raises the `RunError` that it raised."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [action(), None]
        except RunError as error:
            outcome = [None, (str(error), error.exit_code)]
    value, failed = broadcast_object_list(outcome)
    if failed:
        raise RunError(*failed)
    return value


def agree(what: str, value: Any) -> None:
    """Raise `RunError` unless every process has the same value: DDP would mix up different layers without a word."""
    first = broadcast_object_list([value])[0]
    if not all(gather_object([first == value])):
        raise RunError(f"the processes disagree about {what}")


@contextmanager
def asked_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on the first SIGTERM or SIGINT instead of dying of it; a second one is let through."""
    before: dict[int, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        signal.signal(number, before[number])
        stop()

    try:
        before |= {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
