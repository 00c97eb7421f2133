"""What holds for every test: no network, one thread a process, so that workers side by side don't slow each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# before any test imports what reads them
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Each test, and each rank that it forks, finds accelerate as a new process does: it remembers its first launch."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
