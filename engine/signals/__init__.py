"""The signals that advice listens to. A new one is a file here and a word in `SIGNALS`."""

from engine.signals.auto_rgn import AutoRGN
from engine.signals.base import Evidence, Gradients, Signal
from engine.signals.bypass import Bypass
from engine.signals.cross_half_gain import CrossHalfGain
from engine.signals.fim import FIM
from engine.signals.gsnr import GSNR
from engine.signals.kappa import Kappa
from engine.signals.linear_probe import LinearProbe
from engine.signals.spectrum import Spectrum

SIGNALS: tuple[type[Signal], ...] = (LinearProbe, Bypass, CrossHalfGain, GSNR, AutoRGN, FIM, Spectrum, Kappa)

__all__ = ["SIGNALS", "Evidence", "Gradients", "Signal"]
