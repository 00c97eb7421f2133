"""Recordings: decoded, mixed down to one channel, and brought to the rate that a model listens at.

WAV is read by SciPy, which is here anyway; every other kind needs the package soundfile. Nothing is drawn at random,
and a recording is cut only where a recipe says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import gcd
from typing import TYPE_CHECKING, Any

from engine.errors import ENVIRONMENT, RunError
from engine.tasks.files import File, UnreadableError, content, name

if TYPE_CHECKING:
    import numpy as np

SHORTEST = 0.025
"""Seconds; one window of speech analysis, and what the convolutions of wav2vec 2.0 need for a single frame."""


def read(value: File, rate: int, seconds: float | None = None) -> np.ndarray:
    """A recording at `rate` samples a second (samples,), between -1 and 1, its first `seconds` only.

    Raises `UnreadableError`, and `RunError` where the package that reads its kind is not installed.
    """
    import numpy as np
    from scipy.signal import resample_poly

    samples, own = _decoded(value)
    samples = samples[: round(seconds * own)] if seconds else samples
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    if own != rate:
        shared = gcd(own, rate)
        mono = resample_poly(mono, rate // shared, own // shared)
    return mono.astype(np.float32)


def seconds(value: File) -> float:
    """How long a recording lasts. Raises as `read` does."""
    samples, rate = _decoded(value)
    return len(samples) / rate


def check(value: File) -> None:
    """Decode a recording to see whether it is whole and long enough. Raises as `read` does."""
    _decoded(value)


def _decoded(value: File) -> tuple[np.ndarray, int]:
    """Samples as floats, (samples,) or (samples, channels), and how many a second has."""
    import numpy as np

    raw = content(value)
    try:
        samples, rate = _wav(raw) if raw[:4] in (b"RIFF", b"RIFX", b"RF64") else _other(value, raw)
    except RunError:
        raise
    except Exception as error:  # damaged bytes bring any kind of error out of a decoder, UnboundLocalError included
        reason = " ".join(str(error).split())[:200] if isinstance(error, ValueError) else "its header is damaged"
        what = f"can't be decoded: {reason}" if raw else "is empty"
        raise UnreadableError(f"{name(value)} {what}") from error
    if not rate or not np.isfinite(samples).all():
        raise UnreadableError(f"{name(value)} has {'samples that are no numbers' if rate else 'no sampling rate'}")
    if len(samples) < SHORTEST * rate:
        raise UnreadableError(f"{name(value)} lasts {len(samples) / rate * 1000:.0f} ms, too short to hear anything in")
    return samples, rate


def _wav(raw: bytes) -> tuple[np.ndarray, int]:
    import numpy as np
    from scipy.io import wavfile

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Chunk .non-data. not understood")
        warnings.filterwarnings("error", message="Reached EOF prematurely")
        try:
            rate, samples = wavfile.read(BytesIO(raw))
        except wavfile.WavFileWarning as error:
            raise ValueError("it ends before its time") from error
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128, rate
    if np.issubdtype(samples.dtype, np.integer):  # 24 bits come in the upper part of 32
        return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min), rate
    return samples.astype(np.float64), rate


def _other(value: File, raw: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        sentence = f"{name(value)} is no WAV file, and reading others takes a package; run `pip install soundfile`"
        raise RunError(sentence, ENVIRONMENT) from error
    return soundfile.read(BytesIO(raw), dtype="float64")


def pad(processor: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a feature extractor made of recordings, padded to the longest: tensors, batch first."""
    first = processor.model_input_names[0]
    padded = processor.pad([{first: example[first]} for example in examples], padding=True, return_tensors="pt")
    return dict(padded)
