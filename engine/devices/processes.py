"""What the processes of a run must agree on: how many they are, and what the first of them has found.

A process that fails alone leaves the others waiting for it, so whatever one of them does for all, all of them learn how
it went before anyone goes on. What all of them find is told by the first alone.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from engine.errors import CRASH, ENVIRONMENT, GUARD, REFUSED, EchoError, FrostlineError, RunError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=5)
"""How long a process waits for another before the run ends; half an hour, the default, is a long time.

While the first does something for all, however long it takes, it keeps telling them that it is at work.
"""
GRACE = 3.0
"""Seconds within which a signal that comes again is the same one: launchers pass on what a terminal has sent to all."""

_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out waiting|broken pipe|heartbeat", re.IGNORECASE)
_AT_WORK = "at work"
_waiting: list[distributed.ProcessGroup] = []
"""The group in which all others wait for the first."""


def launched() -> Accelerator:
    """The accelerator, once it agrees with the launcher about the number of processes.

    Raises `RunError` where they disagree: every process would believe it is alone, or one would do the work of many.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1 and "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        sentence = "`accelerate launch --cpu --num_processes N` starts one process, whatever N is"
        raise RunError(f"{sentence}; use `--multi_gpu --num_processes N`, which runs on CPUs as well", REFUSED)
    if asked > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        sentence = f"WORLD_SIZE says {asked} processes, but no launcher has told this one which of them it is"
        raise RunError(f"{sentence}; use `accelerate launch --multi_gpu --num_processes {asked}`", REFUSED)
    _refuse_unfit(int(os.environ.get("RANK", "0")))
    cpu = not torch.accelerator.is_available()
    with _meeting():
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    if asked != accelerator.num_processes:
        sentence = f"the launcher started {asked} processes and accelerate counts {accelerator.num_processes}"
        raise RunError(f"{sentence}; on CPUs use `accelerate launch --multi_gpu --num_processes {asked}`", REFUSED)
    if _wanted("FSDP") and not accelerator.is_fsdp2:
        sentence = "accelerate would train without FSDP here, for that takes several accelerators"
        raise alike(accelerator, f"{sentence}; leave `--use_fsdp` out", REFUSED)
    with _meeting():
        _waiting[:] = [distributed.new_group(backend="gloo", timeout=TIMEOUT)] if distributed.is_initialized() else []
    return accelerator


UNFIT = {
    "DEEPSPEED": "DeepSpeed keeps what it was made for: after a change of stages it trains other weights than asked",
    "MEGATRON_LM": "Megatron-LM trains models of its own making",
    "PARALLELISM_CONFIG": "tensor, context and sequence parallelism split the layers that stages name",
}
"""What accelerate can do and a run can't go by, and why."""


def _wanted(backend: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{backend}", "false").lower() in ("1", "true", "yes")


def _refuse_unfit(rank: int) -> None:
    """Raise `RunError` for what no run can go by, before anything is set up for it."""
    told = RunError if rank == 0 else EchoError
    if found := next(filter(_wanted, UNFIT), None):
        raise told(f"{UNFIT[found]}; use DDP (`--multi_gpu`) or FSDP2 (`--use_fsdp --fsdp_version 2`)", REFUSED)
    if _wanted("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        what = "FSDP1 melts the weights of a layer into one, which then trains as a whole or not at all"
        raise told(f"{what}; use `--fsdp_version 2`", REFUSED)
    # Every process reads the model: each compares all that it trains with it.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


@contextmanager
def _meeting() -> Iterator[None]:
    """Inside, the processes look for each other; one that looks in vain is a sentence."""
    try:
        yield
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if not isinstance(error, distributed.DistError) and not _LOST.search(words):
            raise
        what = f"the processes of this run did not find each other ({words[:160]})"
        advice = "see what the others say, and that the address and port of the first can be reached"
        raise RunError(f"{what}; {advice}", ENVIRONMENT) from error


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on the main process; every process gets its value, or fails as it failed, but in silence."""
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        with _heard():
            try:
                outcome = [action(), None]
            except Exception as error:
                failure, outcome = error, [None, _told(error)]
    value, failed = _broadcast(outcome)
    while failed == _AT_WORK:
        value, failed = _broadcast(outcome)
    if failure:
        raise failure
    if failed:
        raise EchoError(*failed)
    return value


def first(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on the main process, then, if it went well there, on all others, which find it in a cache."""
    mine: list[T] = []
    together(accelerator, lambda: mine.append(action()))
    return mine[0] if mine else action()


def alike(accelerator: Accelerator, sentence: str, exit_code: int = GUARD) -> RunError:
    """What every process has found, as an error that only the main one tells."""
    return (RunError if accelerator.is_main_process else EchoError)(sentence, exit_code)


def _told(error: Exception) -> tuple[str, int]:
    return str(error), error.exit_code if isinstance(error, FrostlineError) else CRASH


def _broadcast(outcome: list[Any]) -> list[Any]:
    heard = list(outcome)
    if _waiting:
        distributed.broadcast_object_list(heard, src=0, group=_waiting[0], device=torch.device("cpu"))
    return heard


@contextmanager
def _heard() -> Iterator[None]:
    """Inside, the first process tells all others now and then that it is at work: a silent one is given up for lost."""
    over = Event()

    def tell() -> None:
        with suppress(RuntimeError):  # one that is gone is found out by whoever needs it next
            while not over.wait(TIMEOUT.total_seconds() / 5):
                _broadcast([None, _AT_WORK])

    teller = Thread(target=tell, daemon=True)
    if _waiting:
        teller.start()
    try:
        yield
    finally:
        over.set()
        if _waiting:
            teller.join()


@contextmanager
def peers(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a process that is waited for in vain is one sentence: killed, cut off, or silent for too long."""
    try:
        yield
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if accelerator.num_processes == 1 or not _LOST.search(words):
            raise
        what = f"another process of this run is gone or no longer answers ({words[:160]})"
        raise RunError(f"{what}; the same command goes on from the last checkpoint", ENVIRONMENT) from error


def agree(what: str, value: Any) -> None:
    """Raise `RunError` unless every process has the same value: DDP would mix up different layers without a word."""
    first = broadcast_object_list([value])[0]
    if not all(gather_object([first == value])):
        raise RunError(f"the processes disagree about {what}")


@contextmanager
def asked_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on SIGTERM, SIGINT or SIGHUP instead of dying of it; one that comes a while later is let through."""
    before: dict[int, Any] = {}
    asked: list[float] = []

    def handle(number: int, _frame: Any) -> None:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > GRACE:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        stop()

    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` has a run outlive its terminal
                before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
