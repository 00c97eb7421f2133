"""The signals that advice listens to. A new one is a file here and a word in `SIGNALS`."""

SIGNALS = ()

__all__ = ["SIGNALS"]
