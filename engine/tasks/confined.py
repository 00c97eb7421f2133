"""Work on what a stranger wrote, in a process of its own that has little time and little memory.

A chat template is a program: it can loop for hours or ask for all memory there is, and nothing in the same process can
stop it. Nothing here knows what the work is, and nothing of it is believed but plain values.
"""

from __future__ import annotations

import json
import os
import select
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 10.0
"""Wall time for one item; an honest one takes milliseconds."""
ROOM = 2**30
"""Bytes of memory beyond what the process has already."""


class ConfinedError(Exception):
    """Why an item came to nothing, as the end of a sentence that says what was tried."""


def confined(work: Callable[[T], Any], items: Sequence[T]) -> Iterator[Any]:
    """`work` of each item in turn, done in one child process for all; values travel as JSON.

    Raises `ConfinedError` for the first item that takes longer than `SECONDS`, more memory than `ROOM`, or fails.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of any fork beside threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _work(work, items, writer)
    os.close(writer)
    try:
        lines = _lines(reader)
        for _ in items:
            answer = json.loads(next(lines))
            if "failed" in answer:
                raise ConfinedError(answer["failed"])
            yield answer["value"]
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _work(work: Callable[[T], Any], items: Sequence[T], writer: int) -> None:
    """What the child does until it ends; it never comes back."""
    try:
        _limit()
        with os.fdopen(writer, "w", encoding="utf-8") as answers:
            for item in items:
                answers.write(json.dumps(_answer(work, item)) + "\n")
                answers.flush()
    finally:
        os._exit(0)


def _answer(work: Callable[[T], Any], item: T) -> dict[str, Any]:
    try:
        return {"value": work(item)}
    except MemoryError:
        return {"failed": f"takes more than {ROOM // 2**20:,} MiB of memory"}
    except Exception as error:
        return {"failed": " ".join(str(error).split()) or type(error).__name__}


def _limit() -> None:
    import resource

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in a forked process
    resource.setrlimit(resource.RLIMIT_CPU, (600, 600))  # for one whose parent is gone
    with suppress(FileNotFoundError):  # no /proc: only its time is limited
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))


def _lines(reader: int) -> Iterator[bytes]:
    """The child's answers as they come; raises `ConfinedError` where it is silent for too long, or gone."""
    rest = b""
    while True:
        while b"\n" not in rest:
            if not select.select([reader], [], [], SECONDS)[0]:
                raise ConfinedError(f"takes longer than {SECONDS:.0f} s")
            if not (more := os.read(reader, 2**20)):
                raise ConfinedError(f"takes more than {ROOM // 2**20:,} MiB of memory, or ends its process")
            rest += more
        line, _, rest = rest.partition(b"\n")
        yield line
