"""Pictures: decoded, varied at random, and prepared as a model takes them.

The image libraries that the field augments with all bring a second one along (torchvision, or OpenCV, which is larger
than all of Frostline's own dependencies but torch); a crop, a mirror and a change of light are a few lines of Pillow,
which is here anyway. Nothing is drawn but from a seed that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import exp, log
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from engine.errors import PlanError, Problem
from engine.part import Part
from engine.tasks.files import File, UnreadableError, content, name

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

TRIES = 10
"""How often a crop is drawn before the whole picture is taken, as in torchvision."""
RATIOS = (3 / 4, 4 / 3)
"""Widths to heights of a crop."""

Positive = Annotated[float, Field(gt=0, le=1)]


class Augmentation(Part):
    """How pictures vary while they are trained on; those that judge never do."""

    random_resized_crop: Positive | None = None
    """Smallest share of a picture that is cut out and shown in its place (Szegedy et al. 2015 took 0.08)."""
    horizontal_flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the pictures that are shown in the mirror."""
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """By how much brightness, contrast and colour may change, as a share."""


def read(value: File) -> Image.Image:
    """A picture as it is meant to be seen: upright, in three colours. Raises `UnreadableError`."""
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(_opened(value))
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow would cut all that is brighter than 255 off: a 16-bit picture would be white.
        picture = picture.point(lambda level: level / 256).convert("L")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def read_ids(value: File) -> np.ndarray:
    """A map of class ids (height, width). Raises `UnreadableError` for what is a picture in colour instead."""
    import numpy as np

    picture = _opened(value)
    if picture.mode not in ("1", "L", "P", "I", "I;16"):
        raise UnreadableError(f"{name(value)} is a picture in {picture.mode}, not a map with one class id a pixel")
    return np.asarray(picture).astype(np.int64)


def check(value: File) -> None:
    """Decode a picture as cheaply as tells whether it is whole. Raises `UnreadableError`."""
    _opened(value, smallest=True)


def _opened(value: File, smallest: bool = False) -> Image.Image:
    from PIL import Image

    raw = content(value)
    try:
        picture = Image.open(BytesIO(raw))
        if smallest:
            picture.draft("RGB", (1, 1))  # an eighth of a JPEG's sides: all of its bytes are read, few pixels computed
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = "is empty" if not raw else f"can't be decoded: {_plain(error)}"
        raise UnreadableError(f"{name(value)} {what}") from error
    return picture


def _plain(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of a known kind"
    return " ".join(str(error).split())[:200]


def prepare(processor: Any, pictures: Sequence[Image.Image], **more: Any) -> list[np.ndarray]:
    """Pictures as the model takes them, (channels, height, width) each."""
    import numpy as np

    return [np.asarray(pixels) for pixels in processor(images=list(pictures), **more)["pixel_values"]]


def stacked(pixels: Sequence[np.ndarray]) -> Any:
    """Pictures as one tensor (pictures, channels, height, width); raises `PlanError` where their sizes differ."""
    import numpy as np
    import torch

    if len({picture.shape for picture in pixels}) > 1:
        what = "its image processor leaves pictures of different sizes, so they can't share a batch"
        raise PlanError([Problem(("model", "path"), what, "take one that resizes to one height and width, or crops")])
    return torch.from_numpy(np.stack(pixels))


def vary(
    picture: Image.Image, how: Augmentation, seed: int, ids: Image.Image | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """The picture as the seed varies it, and its map of class ids cut and mirrored alike."""
    import numpy as np
    from PIL import Image, ImageEnhance

    draw = np.random.default_rng(seed)
    if how.random_resized_crop:
        box = _crop(draw, picture.width, picture.height, how.random_resized_crop)
        picture, ids = picture.crop(box), ids.crop(box) if ids else None
    if draw.random() < how.horizontal_flip:
        mirror = Image.Transpose.FLIP_LEFT_RIGHT
        picture, ids = picture.transpose(mirror), ids.transpose(mirror) if ids else None
    if how.color_jitter:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = kind(picture).enhance(1 + how.color_jitter * draw.uniform(-1, 1))
    return picture, ids


def _crop(draw: np.random.Generator, width: int, height: int, smallest: float) -> tuple[int, int, int, int]:
    """The box of a crop whose area and ratio of sides are drawn at random: left, top, right, bottom."""
    for _ in range(TRIES):
        area = width * height * draw.uniform(smallest, 1)
        ratio = exp(draw.uniform(*map(log, RATIOS)))
        across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < across <= width and 0 < down <= height:
            left, top = int(draw.integers(width - across + 1)), int(draw.integers(height - down + 1))
            return left, top, left + across, top + down
    return 0, 0, width, height
