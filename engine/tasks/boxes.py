"""Boxes in pictures: as data sets write them, as COCO has them, and how well some fit others.

A box is [left, top, width, height] in pixels, as in COCO. Nothing is moved or cut to fit: what lies outside its picture
is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from engine.errors import PlanError, Problem
from engine.tasks.base import Table

FORM = "write `objects: {bbox: [[left, top, width, height], ...], category: [...]}`, in pixels"
BOXES = ("bbox", "bboxes", "boxes", "box")
KINDS = ("category", "categories", "category_id", "label", "labels", "class", "classes", "id_class")
SLACK = 1.0
"""Pixels by which a box may leave its picture: many were rounded."""


@dataclass(frozen=True)
class Objects:
    """What one picture holds."""

    boxes: tuple[tuple[float, ...], ...]
    kinds: tuple[Any, ...]
    """The class of each, as the data have it: a name or an id."""


def read(value: Any) -> Objects:
    """The objects of a row: a mapping of lists, or a list of mappings. Raises `ValueError`."""
    value = json.loads(value) if isinstance(value, str) else value
    if isinstance(value, list):
        each = [json.loads(item) if isinstance(item, str) else item for item in value]
        value = {key: [item[key] for item in each] for key in (each[0] if each else {})}
    if not isinstance(value, Mapping):
        raise ValueError("the objects are no mapping of lists")
    placed = next((value[key] for key in BOXES if value.get(key) is not None), [])
    kinds = next((value[key] for key in KINDS if value.get(key) is not None), [])
    if len(placed) != len(kinds):
        raise ValueError(f"there are {len(placed)} boxes and {len(kinds)} classes")
    return Objects(tuple(tuple(map(float, box)) for box in placed), tuple(kinds))


def check(objects: Objects, width: int, height: int) -> None:
    """Raise `ValueError` for a box that is none, or lies outside its picture."""
    for box in objects.boxes:
        if len(box) != 4 or not all(map(isfinite, box)) or box[2] <= 0 or box[3] <= 0:
            raise ValueError(f"{list(box)} is no box")
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
            raise ValueError(f"the box {list(box)} lies outside its picture of {width} x {height} pixels")


def classes(train: Table, found: Sequence[Objects], asked: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Names of the classes, in the order of their ids, and whether rows hold `names` or `ids`."""
    kinds = {kind for objects in found for kind in objects.kinds}
    if not kinds:
        what = f"{train.name}: no picture holds an object"
        raise PlanError([Problem(("data", "columns", "objects"), what, FORM)])
    if all(isinstance(kind, str) for kind in kinds):
        return tuple(asked or sorted(kinds)), "names"
    named = asked or _declared(train.features.get("objects"))
    return tuple(named or (f"LABEL_{index}" for index in range(max(map(int, kinds)) + 1))), "ids"


def _declared(feature: Any) -> tuple[str, ...]:
    """The names of a `ClassLabel` somewhere inside a feature."""
    if getattr(feature, "names", None):
        return tuple(feature.names)
    inner = feature.values() if isinstance(feature, Mapping) else [getattr(feature, "feature", None)]
    inner = feature if isinstance(feature, list) else inner
    return next((names for each in inner if each is not None and (names := _declared(each))), ())


def beyond(table: Table, found: Sequence[Objects], names: Sequence[str], form: str) -> Problem | None:
    """The problem of the first row with an object of a class that train doesn't have."""
    for index, objects in enumerate(found):
        for kind in objects.kinds:
            if (form == "names" and kind not in names) or (form == "ids" and not _is_id(kind, len(names))):
                what = f"{table.row(index)}: an object is of the class `{kind}`, and train has {', '.join(names[:9])}"
                return Problem(("data", "columns", "objects"), what, "leave it out, or name all classes by `labels`")
    return None


def _is_id(kind: Any, count: int) -> bool:
    return isinstance(kind, int | float) and float(kind).is_integer() and 0 <= kind < count


def ids(objects: Objects, names: Sequence[str], form: str) -> Objects:
    """The same objects with ids for classes."""
    known = {name: index for index, name in enumerate(names)}
    return Objects(objects.boxes, tuple(known[kind] if form == "names" else int(kind) for kind in objects.kinds))


def coco(number: int, objects: Objects) -> dict[str, Any]:
    """The objects of one picture as COCO annotates them, which is what image processors take."""
    annotations = [
        {"image_id": number, "bbox": list(box), "category_id": kind, "area": box[2] * box[3], "iscrowd": 0}
        for box, kind in zip(objects.boxes, objects.kinds, strict=True)
    ]
    return {"image_id": number, "annotations": annotations}


SCALE = 1000.0
"""Sides of a picture in COCO's evaluation: overlaps are shares, so any will do, and it ignores boxes below a pixel."""


def precision(found: Sequence[Any], there: Sequence[Any], count: int) -> dict[str, float]:
    """COCO's mean average precision and recall of boxes (centre, size, class, and of what was found a score)."""
    from contextlib import redirect_stdout
    from io import StringIO

    import numpy as np
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, guess = COCO(), COCO()
    for told, rows in ((truth, there), (guess, found)):
        told.dataset = {
            "images": [{"id": i} for i in range(len(rows))],
            "categories": [{"id": i} for i in range(count)],
        }
        told.dataset["annotations"] = list(_annotated(rows))
    with redirect_stdout(StringIO()):  # it prints its progress
        truth.createIndex(), guess.createIndex()
        judged = COCOeval(truth, guess, "bbox")
        judged.params.areaRng, judged.params.areaRngLbl = [[0, 1e10]], ["all"]
        judged.evaluate(), judged.accumulate()
    overlaps, recalls = judged.eval["precision"][..., 0, -1], judged.eval["recall"][..., 0, -1]
    at = {"map": slice(None), "map_50": slice(0, 1), "map_75": slice(5, 6)}
    means = {name: _mean(overlaps[part]) for name, part in at.items()}
    return {**means, "mar_100": _mean(np.asarray(recalls))}


def _annotated(rows: Sequence[Any]) -> Any:
    number = 0
    for picture, objects in enumerate(rows):
        for x, y, width, height, kind, *score in objects.tolist():
            number += 1  # COCO takes 0 for no match
            box = [(x - width / 2) * SCALE, (y - height / 2) * SCALE, width * SCALE, height * SCALE]
            known = {"id": number, "image_id": picture, "category_id": int(kind), "bbox": box, "iscrowd": 0}
            yield {**known, "area": box[2] * box[3], **({"score": score[0]} if score else {})}


def _mean(values: Any) -> float:
    """Over the classes that are there; COCO marks others with -1."""
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
