"""Plans for models of real size from their config alone: known sizes, 15 seconds, 1.5 GiB, nothing downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import bench_plan


@pytest.mark.slow
@pytest.mark.parametrize("name", bench_plan.CASES)
def test_plan_is_quick_small_and_right(name: str) -> None:
    measured = bench_plan.measure(name)
    *_, size = bench_plan.CASES[name]
    assert measured.plan["size"] == pytest.approx(size, rel=1e-3)
    assert measured.plan["measured"]
    assert all(0 < stage["size"] < measured.plan["size"] for stage in measured.plan["stages"])
    assert measured.within, measured
