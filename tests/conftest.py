"""What holds for every test: no network, one thread a process, so that workers side by side don't slow each other."""

from __future__ import annotations

import os

# before any test imports what reads them
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}
