"""What a process takes, and how fast a machine trains: held against what is known to be taken and computed."""

from __future__ import annotations

import pytest
import torch

from engine.devices import memory, speed
from engine.frost.tracing import Flops

CPU = torch.device("cpu")
SIZE = 200_000_000


def test_what_is_taken_is_seen_and_its_peak_outlives_it() -> None:
    memory.restart(CPU)
    before = memory.taken(CPU)
    block = torch.ones(SIZE, dtype=torch.uint8)
    assert memory.taken(CPU) - before == pytest.approx(SIZE, rel=0.1)
    del block
    assert memory.taken(CPU) < before + SIZE / 2
    assert memory.peak(CPU) - before == pytest.approx(SIZE, rel=0.1)


def test_a_peak_begins_anew() -> None:
    block = torch.ones(SIZE, dtype=torch.uint8)
    high = memory.peak(CPU)
    del block
    memory.restart(CPU)
    if memory.peak(CPU) > high - SIZE / 2:
        pytest.skip("this system lets no process forget its peak")
    assert memory.peak(CPU) < high - SIZE / 2


def test_a_system_without_proc_tells_the_most_ever(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    memory.restart(CPU)
    assert memory.peak(CPU) == memory.taken(CPU) > 10_000_000


def test_a_rate_counts_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many FLOPs as torch counts in a pass; the time is the clock's."""
    passes = []

    def counted(block: torch.nn.Module, tokens: torch.Tensor) -> None:
        with Flops() as flops:
            real(block, tokens)
        passes.append(flops.total)

    real = speed._pass
    monkeypatch.setattr(speed, "_pass", counted)
    clock = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(speed, "SECONDS", 3.0)
    found = speed.rate(32, 48)
    timed = passes[1:]  # the first warms up
    assert len(timed) == 2
    assert found == pytest.approx(sum(timed) / 3.0)
