"""The schedules: each generates a list of stages. A new one is a file here and a word in `SCHEDULES`."""

from engine.schedules.base import EarlyStopping, Schedule, StageEntry
from engine.schedules.bitfit import BitFit
from engine.schedules.block_coordinate import BlockCoordinate
from engine.schedules.chain_thaw import ChainThaw
from engine.schedules.gradual import Gradual
from engine.schedules.lisa import LISA
from engine.schedules.lp_ft import LPFT
from engine.schedules.sliding import Sliding
from engine.schedules.surgical import Surgical

SCHEDULES = (Gradual, LPFT, ChainThaw, Sliding, LISA, BlockCoordinate, Surgical, BitFit)

__all__ = ["SCHEDULES", "EarlyStopping", "Schedule", "StageEntry"]
