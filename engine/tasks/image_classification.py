"""Image classification: one label, several labels or a number for a picture.

Pictures are decoded as they are read, prepared by the model's own image processor, and varied only while they are
trained on and only where a recipe says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from engine import metrics
from engine.tasks import labels, pictures
from engine.tasks.base import SEED, Example, Facts, Table, Task
from engine.tasks.columns import stop_at
from engine.tasks.files import not_files
from engine.tasks.pictures import Augmentation


class ImageClassification(Task):
    """One label, several labels or a number for a picture."""

    auto = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    columns = {
        "image": ("image", "img", "picture", "pixel_values"),
        "label": ("label", "labels", "fine_label", "class", "target", "category"),
    }
    target = "label"
    encoded_once = False

    type: Literal["image-classification"]
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """Hugging Face's word for what the label column holds; found from the column itself if left out."""
    augmentation: Augmentation | None = None
    """How pictures vary while they are trained on; not at all if left out, and then the frozen prefix can be kept."""

    @property
    def draws(self) -> bool:
        return self.augmentation is not None

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        stop_at(not_files(table, "image", "pictures") for table in tables.values())
        return labels.learn(tables, self.problem_type)

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        """`pixel_values` (channels, height, width), or the `picture` itself where it is still to be varied."""
        seen = [pictures.read(value) for value in rows["image"]]
        made = {"picture": seen} if self.draws else {"pixel_values": pictures.prepare(processor, seen)}
        return {**made, "labels": labels.encode(rows["label"], facts)}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch

        def batch(examples: Sequence[Example]) -> dict[str, Any]:
            if self.draws:
                pixels = pictures.prepare(processor, [self._shown(example) for example in examples])
            else:
                pixels = [example["pixel_values"] for example in examples]
            return {
                "pixel_values": pictures.stacked(pixels),
                "labels": torch.tensor([example["labels"] for example in examples]),
            }

        return batch

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        return metrics.compute(names, facts.problem, predictions, references)

    def _shown(self, example: Example) -> Any:
        """The picture as it is, or as its seed varies it where it is trained on."""
        picture, how = example["picture"], self.augmentation
        return pictures.vary(picture, how, example[SEED])[0] if how and SEED in example else picture
