"""Semantic image segmentation: a class for every pixel.

Labels are maps with one class id a pixel, of their picture's own size; 255 stands for what is neither taught nor
judged. What is judged is a prediction enlarged to the size of its map, as Long et al. 2015 do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from engine.errors import PlanError, Problem
from engine.tasks import pictures
from engine.tasks.base import SEED, Example, Facts, Table, Task
from engine.tasks.columns import stop_at
from engine.tasks.files import UnreadableError, not_files
from engine.tasks.pictures import Augmentation

if TYPE_CHECKING:
    import numpy as np

IGNORED = 255
"""The id of pixels without a class: transformers' `semantic_loss_ignore_index`."""


class ImageSegmentation(Task):
    """A class for every pixel of a picture."""

    auto = "AutoModelForSemanticSegmentation"
    processor = "AutoImageProcessor"
    columns = {
        "image": ("image", "img", "picture", "pixel_values"),
        "label": ("label", "annotation", "mask", "segmentation_mask", "semantic_mask", "labels"),
    }
    encoded_once = False
    smooths = False
    own_metrics = ("mean_iou", "mean_accuracy", "overall_accuracy")

    type: Literal["image-segmentation"]
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Names of the classes, in the order of their ids; `LABEL_0` and so on if left out."""
    do_reduce_labels: bool = False
    """Whether id 0 is a background that counts for nothing, and the classes begin at 1."""
    augmentation: Augmentation | None = None
    """How pictures vary while they are trained on; not at all if left out, and then the frozen prefix can be kept."""

    @property
    def draws(self) -> bool:
        return self.augmentation is not None

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        for column, what in (("image", "pictures"), ("label", "maps of class ids")):
            stop_at(not_files(table, column, what) for table in tables.values())
        highest = {split: max(self._highest(table)) for split, table in tables.items()}
        known = len(self.labels) if self.labels else highest["train"] + 1
        for split, found in highest.items():
            if found >= known:
                what = f"{tables[split].name}: a map holds the class {found}, but there are {known}, 0 to {known - 1}"
                raise PlanError([Problem(("data", "columns", "label"), what, f"{IGNORED} marks what has no class")])
        if known < 2:
            what = f"{tables['train'].name}: every pixel has one class, so there is nothing to tell apart"
            raise PlanError([Problem(("data", "columns", "label"), what, "name the column that holds the maps")])
        names = self.labels or tuple(f"LABEL_{index}" for index in range(known))
        return Facts(names, "", "ids", {"num_labels": known}, (f"{known} classes in the maps of train",))

    def _highest(self, table: Table) -> Iterator[int]:
        """The highest class id of each map; raises `PlanError` where a map doesn't fit its picture."""
        pairs = zip(table.columns["image"], table.columns["label"], strict=True)
        for index, (picture, label) in enumerate(pairs):
            try:
                ids, (width, height) = pictures.read_ids(label.as_py()), pictures.read(picture.as_py()).size
            except UnreadableError as error:
                raise PlanError([Problem(("data", "columns", "label"), f"{table.row(index)}: {error}")]) from error
            if ids.shape != (height, width):
                sizes = f"{ids.shape[1]} x {ids.shape[0]} pixels, its picture {width} x {height}"
                raise PlanError([Problem(("data", "columns", "label"), f"{table.row(index)}: the map has {sizes}")])
            yield int(max(self._classes(ids).ravel(), key=lambda found: -1 if found == IGNORED else found))

    def _classes(self, ids: np.ndarray) -> np.ndarray:
        """Class ids as the loss wants them (height, width): reduced by one where the recipe says so."""
        import numpy as np

        return np.where((ids == 0) | (ids == IGNORED), IGNORED, ids - 1) if self.do_reduce_labels else ids

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        seen = [pictures.read(value) for value in rows["image"]]
        maps = [self._classes(pictures.read_ids(value)) for value in rows["label"]]
        if self.draws:
            return {"picture": seen, "map": maps}
        return dict(zip(("pixel_values", "labels"), _prepared(processor, seen, maps), strict=True))

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch

        def batch(examples: Sequence[Example]) -> dict[str, Any]:
            pixels, maps = [[example.get(name) for example in examples] for name in ("pixel_values", "labels")]
            if self.draws:
                shown = [self._shown(example) for example in examples]
                pixels, maps = _prepared(processor, *zip(*shown, strict=True))
            return {"pixel_values": pictures.stacked(pixels), "labels": pictures.stacked(maps).to(torch.long)}

        return batch

    def _shown(self, example: Example) -> tuple[Any, np.ndarray]:
        import numpy as np
        from PIL import Image

        how, ids = self.augmentation, example["map"]
        if how is None or SEED not in example:
            return example["picture"], ids
        picture, varied = pictures.vary(example["picture"], how, example[SEED], Image.fromarray(ids.astype(np.int32)))
        return picture, np.asarray(varied)

    def weight(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Per example, of each class: (pixels rightly given to it, pixels given to it), and pixels that are of it."""
        from torch.nn.functional import interpolate

        wanted = batch["labels"]
        logits = interpolate(outputs.logits.float(), size=wanted.shape[-2:], mode="bilinear", align_corners=False)
        counts = [_counts(given, true, logits.shape[1]) for given, true in zip(logits.argmax(1), wanted, strict=True)]
        return [counted[:2] for counted in counts], [counted[2] for counted in counts]

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        """Over all pixels of the split; classes that are neither there nor predicted are left out of a mean."""
        import numpy as np

        (right, given), true = np.sum(predictions, axis=0), np.sum(references, axis=0)
        with np.errstate(all="ignore"):
            found = {
                "mean_iou": _mean(right / (given + true - right)),
                "mean_accuracy": _mean(right / true),
                "overall_accuracy": float(right.sum() / true.sum()),
            }
        return {name: found[name] for name in names}


def _prepared(
    processor: Any, seen: Sequence[Any], maps: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Pictures (channels, height, width) and maps (height, width), of one size, as the model's processor makes them."""
    import numpy as np

    try:
        made = processor(images=list(seen), segmentation_maps=list(maps), do_reduce_labels=False)
        return [np.asarray(each) for each in made["pixel_values"]], [np.asarray(each) for each in made["labels"]]
    except (TypeError, KeyError, ValueError) as error:
        what = f"its image processor, {type(processor).__name__}, doesn't prepare maps of classes"
        raise PlanError([Problem(("model", "path"), what, "take a model that is made to segment")]) from error


def _counts(given: Any, true: Any, classes: int) -> np.ndarray:
    """Pixels rightly given to each class, pixels given to it, and pixels that are of it: (3, classes)."""
    import torch

    live = true != IGNORED
    given, true = given[live], true[live]
    counted = [torch.bincount(ids, minlength=classes) for ids in (true[given == true], given, true)]
    return torch.stack(counted).cpu().numpy()


def _mean(shares: np.ndarray) -> float:
    import numpy as np

    return float(shares[np.isfinite(shares)].mean()) if np.isfinite(shares).any() else float("nan")
