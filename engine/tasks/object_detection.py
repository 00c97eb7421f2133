"""Object detection: boxes around what a picture shows, and what each of them holds (DETR, Carion et al. 2020).

A set of boxes is matched to the objects that are there, one to one, by the model's own loss. Pictures are filled up to
one size for all, so that nothing about an example depends on what shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.errors import PlanError, Problem
from engine.tasks import boxes, pictures
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.boxes import Objects
from engine.tasks.columns import stop_at
from engine.tasks.files import UnreadableError, not_files

MOST = 100
"""Boxes of a picture that are judged, the surest first, as COCO does."""


class ObjectDetection(Task):
    """Boxes around the objects in a picture, and their classes."""

    auto = "AutoModelForObjectDetection"
    processor = "AutoImageProcessor"
    columns = {
        "image": ("image", "img", "picture", "pixel_values"),
        "objects": ("objects", "annotations", "annotation", "labels"),
    }
    target = "objects"
    encoded_once = False
    smooths = False
    own_metrics = ("map", "map_50", "map_75", "mar_100")

    type: Literal["object-detection"]
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the classes, in the order of their ids; those of the data, or `LABEL_0` and so on, if left out."""
    image_size: Annotated[int, Field(ge=32)] | None = None
    """Pixels of the longer side that pictures are brought to, and filled up to a square of; the model's own if left
    out."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        _need_library()
        for table in tables.values():
            stop_at([not_files(table, "image", "pictures")])
        found = {split: list(self._objects(table)) for split, table in tables.items()}
        names, form = boxes.classes(tables["train"], found["train"], self.labels)
        for split, table in tables.items():
            stop_at([boxes.beyond(table, found[split], names, form)])
        held = sum(len(objects.boxes) for objects in found["train"])
        note = f"{held:,} objects of {len(names)} classes in {len(found['train']):,} pictures of train"
        return Facts(names, "", form, notes=(note,))

    def _objects(self, table: Table) -> Iterator[Objects]:
        """What each picture holds; raises `PlanError` where it isn't in the picture."""
        for index, (image, value) in enumerate(zip(table.columns["image"], table.columns["objects"], strict=True)):
            try:
                objects = boxes.read(value.as_py())
                boxes.check(objects, *pictures.read(image.as_py()).size)
            except (UnreadableError, ValueError) as error:
                what = f"{table.row(index)}: {error}"
                raise PlanError([Problem(("data", "columns", "objects"), what, boxes.FORM)]) from error
            yield objects

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        seen = [pictures.read(value) for value in rows["image"]]
        held = [boxes.ids(boxes.read(value), facts.labels, facts.form) for value in rows["objects"]]
        made = _prepared(processor, seen, held, self.image_size)
        classes = [len(facts.labels)] * len(seen)
        return {**made, "classes": classes}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch

        def batch(examples: Sequence[Example]) -> dict[str, Any]:
            made = {"pixel_values": pictures.stacked([example["pixel_values"] for example in examples])}
            if "pixel_mask" in examples[0]:
                made["pixel_mask"] = pictures.stacked([example["pixel_mask"] for example in examples])
            objects = [
                {
                    "class_labels": torch.as_tensor(example["class_labels"], dtype=torch.long),
                    "boxes": torch.as_tensor(example["boxes"], dtype=torch.float32).reshape(-1, 4),
                }
                for example in examples
            ]
            return {**made, "labels": objects, "classes": torch.tensor([e["classes"] for e in examples])}

        return batch

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        device = batch["pixel_values"].device
        labels = [{name: value.to(device) for name, value in each.items()} for each in batch["labels"]]
        return {**{name: value for name, value in batch.items() if name != "classes"}, "labels": labels}

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        with _alone():
            return model(**self.inputs(batch))

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Per example what was found (found, 6) and what is there (objects, 5): centre, size, class; how sure."""
        import torch

        logits, placed = outputs.logits.float(), outputs.pred_boxes.float()
        plain = logits.shape[-1] == int(batch["classes"][0])  # else the last class says that there is nothing
        scores = logits.sigmoid() if plain else logits.softmax(-1)[..., :-1]
        sure, kinds = scores.max(-1)
        found = torch.cat((placed, kinds[..., None].float(), sure[..., None]), -1)
        best = sure.argsort(dim=1, descending=True, stable=True)[:, :MOST, None].expand(-1, -1, 6)
        there = [torch.cat((each["boxes"], each["class_labels"][:, None].float()), 1) for each in batch["labels"]]
        return list(found.gather(1, best).cpu().numpy()), [each.cpu().numpy() for each in there]

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        """COCO's averages over overlaps of 0.5 to 0.95, over all sizes of objects."""
        found = boxes.precision(predictions, references, len(facts.labels))
        return {name: found[name] for name in names}


def _need_library() -> None:
    if find_spec("pycocotools") is None:
        what = "object-detection is judged by the package `pycocotools`, which is not installed"
        raise PlanError([Problem(("task", "type"), what, "run `pip install frostline[object-detection]`")])


def _prepared(processor: Any, seen: Sequence[Any], held: Sequence[Objects], size: int | None) -> dict[str, list[Any]]:
    """Pictures and objects as the model's processor makes them: boxes as shares of the picture, centre and size."""
    import numpy as np

    own = dict(processor.size)
    side = size or own.get("longest_edge") or max(own.values())
    square = {"height": side, "width": side}
    fixed = "height" in own
    how = {"size": square} if fixed else {"size": {"shortest_edge": side, "longest_edge": side}, "pad_size": square}
    try:
        made = processor(
            images=list(seen), annotations=[boxes.coco(i, o) for i, o in enumerate(held)], return_tensors="np", **how
        )
    except (TypeError, KeyError, ValueError) as error:
        what = (
            f"its image processor, {type(processor).__name__}, doesn't prepare boxes ({' '.join(str(error).split())})"
        )
        raise PlanError([Problem(("model", "path"), what, "take a model that is made to detect")]) from error
    masks = {"pixel_mask": list(np.asarray(made["pixel_mask"]))} if _masks(processor) and "pixel_mask" in made else {}
    return {
        "pixel_values": [np.asarray(each) for each in made["pixel_values"]],
        **masks,
        "class_labels": [each["class_labels"] for each in made["labels"]],
        "boxes": [each["boxes"] for each in made["labels"]],
    }


def _masks(processor: Any) -> bool:
    """Whether the model is told which pixels are filling: YOLOS has no say for it."""
    return "pixel_mask" in processor.model_input_names


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, a loss counts the objects of its own micro-batch, and asks no other process for theirs.

    transformers would average the count over all processes; then a batch trained otherwise on two devices than on one,
    and processes that judge a different number of batches would wait for each other forever.
    """
    from transformers.loss import loss_for_object_detection as module

    held = module.is_accelerate_available
    module.is_accelerate_available = lambda: False
    try:
        yield
    finally:
        module.is_accelerate_available = held
