"""What a user sees of a run: one line an event, nothing computed, nothing taken for markup that is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from engine.records import Evaluated, Event, Finished, Note, Proved, StageEnded, StageStarted, Started, Step
from engine.screen import follow, line

HAPPENED: list[tuple[Event, str]] = [
    (Started("pets", "abc", 2, "cuda", "64 examples a step"), "pets on 2 x cuda; 64 examples a step"),
    (Note("2 labels in train"), "note  2 labels in train"),
    (StageStarted("head", 1538, 40, 0, "replays 90%"), "head  1.5 k parameters train for 40 steps; replays 90%"),
    (
        StageStarted("top", 2_000_000, 1200, 4, "in full", step=300),
        "top  2.0 M parameters train for 1,200 steps, 300 of them done before, 4 moments carried over; in full",
    ),
    (Step("head", 10, 40, 0.69314, 1.0, (1e-3,), 0.1), "head  10/40  loss 0.6931  rate 1.00e-03"),
    (Step("top", 1, 9, 2.0, 1.0, (1e-4, 1e-3, 1e-4), 0.1), "top  1/9  loss 2.0000  rate 1.00e-03 to 1.00e-04"),
    (Evaluated("head", 40, "validation", {"loss": 0.5, "f1": 1.0}), "head  40  validation  loss 0.5000  f1 1.0000"),
    (Evaluated("head", 40, "test", {"f1": 0.25}, best=True), "head  40  test  f1 0.2500  (best)"),
    (StageEnded("head", 40, "40 steps done", seconds=1.25), "head  ended after 40 steps: 40 steps done; 1.2 s"),
    (Proved(4, 71), "proved  4 tensors trained and moved, 71 frozen ones are bit-equal"),
    (Finished("runs/pets/model", 12.0), "saved  runs/pets/model  (12.0 s)"),
]


@pytest.mark.parametrize(("event", "said"), HAPPENED, ids=lambda value: type(value).__name__)
def test_an_event_is_one_line(event: Event, said: str) -> None:
    assert Text.from_markup(line(event)).plain == said


def shown(events: list[Event], terminal: bool) -> tuple[str, Event | None]:
    out = io.StringIO()
    last = follow(Console(file=out, width=200, force_terminal=terminal, color_system=None), events)
    return out.getvalue(), last


def test_without_a_terminal_every_event_is_a_plain_line() -> None:
    out, last = shown([event for event, _ in HAPPENED], terminal=False)
    assert out.splitlines() == [said for _, said in HAPPENED]
    assert last == HAPPENED[-1][0]


def test_on_a_terminal_steps_move_a_bar() -> None:
    out, _ = shown([HAPPENED[2][0], HAPPENED[4][0]], terminal=True)
    assert "10/40" in out
    assert "loss 0.6931" in out
    assert "rate 1.00e-03" not in out


def test_nothing_happened() -> None:
    assert shown([], terminal=False)[1] is None


@pytest.mark.parametrize("text", ["columns left aside: [id]", "`[/]` closes nothing", "[link=http://x]look[/link]"])
def test_what_users_wrote_is_no_markup(text: str) -> None:
    """Names of columns and labels come from data, and square brackets in them are theirs."""
    out, _ = shown([Note(text)], terminal=False)
    assert out == f"note  {text}\n"
