"""The schedules: each generates a list of stages. A new one is a file here and a word in `SCHEDULES`."""

from engine.schedules.base import EarlyStopping, Schedule, StageEntry
from engine.schedules.chain_thaw import ChainThaw
from engine.schedules.gradual import Gradual
from engine.schedules.lp_ft import LPFT

SCHEDULES = (Gradual, LPFT, ChainThaw)

__all__ = ["SCHEDULES", "EarlyStopping", "Schedule", "StageEntry"]
