"""Reads COCO-format annotation files (COCO, Objects365 v2, one's own) into columns, trusting nothing in them.

Repairs are counted and reported; what cannot be repaired without guessing is a DataError that names file, id, value
and remedy.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.categories import objects365_categories, objects365_misspelt
from data_pipeline.json_stream import stream_object
from dino_scale.errors import DataError
from dino_scale.structures import Category

AnnotationFormat = Literal["coco", "objects365"]
FLAGS = ("iscrowd", "isfake", "isreflected")  # bit 0, 1, 2 of the flag column; the last two exist in Objects365 only
CROWD = 1
_LARGEST_ID = 2**62
_LARGEST_SIDE = 2**20
_EXAMPLES = 20
_UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what no terminal and no file system should be given


@dataclass
class Repairs:
    """What was mended: how often, and the first few places of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.examples.setdefault(kind, [])
        if len(places) < _EXAMPLES:
            places.append(place)

    def add_all(self, other: Repairs) -> None:
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            places = self.examples.setdefault(kind, [])
            places += other.examples[kind][: _EXAMPLES - len(places)]


@dataclass(frozen=True)
class Annotations:
    """An annotation file as columns; N images, T boxes, boxes sorted by image.

    categories: in order of raw id; the place in it is the contiguous id.
    image_ids (N,) int64, file_names length N, widths and heights (N,) int64 as the file states them.
    box_offsets: (N + 1,) int64; boxes of image i are rows box_offsets[i] to box_offsets[i + 1].
    boxes: (T, 4) float64 x, y, width, height in pixels. areas: (T,) float64. labels: (T,) int32 contiguous ids.
    flags: (T,) uint8, bits as in FLAGS. annotation_ids: (T,) int64.
    """

    path: Path
    categories: tuple[Category, ...]
    image_ids: NDArray[np.int64]
    file_names: list[str]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    box_offsets: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    labels: NDArray[np.int32]
    flags: NDArray[np.uint8]
    annotation_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_ids)


def read_annotations(
    path: Path,
    format: AnnotationFormat,
    repairs: Repairs,
    progress: Callable[[int, int], None] | None = None,
) -> Annotations:
    """Reads and checks an annotation file; adds what it mends to `repairs`. Raises DataError (see the module).

    progress: told how many bytes of how many have been read.
    """
    reader = _Reader(Path(path))
    for key, value in stream_object(reader.path, progress):
        reader.take(key, value)
    reader.check_complete()
    categories = _mend_names(reader, format, repairs)
    return reader.columns(categories, repairs)


class _Reader:
    """Collects the file's elements into flat arrays, checking each as it passes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: set[str] = set()
        self.categories: dict[int, str] = {}
        self.category_names: set[str] = set()
        self.image_names: dict[int, str] = {}
        self.sizes = array("q")
        self.numbers = array("q")  # image id, category id, annotation id of each box
        self.boxes = array("d")
        self.areas = array("d")
        self.flags = array("B")

    def take(self, key: str, value: Any) -> None:
        takers = {"categories": self._category, "images": self._image, "annotations": self._annotation}
        if key not in takers:
            return
        if key not in self.seen:
            if value is not None:
                raise DataError(
                    f"{self.path}: '{key}' is {_shown(value)}: expected a list; is this a COCO-format file?"
                )
            self.seen.add(key)
            return
        if not isinstance(value, dict):
            raise DataError(
                f"{self.path}: '{key}' holds {_shown(value)}: expected objects; is this a COCO-format file?"
            )
        takers[key](value)

    def check_complete(self) -> None:
        for key in ("images", "annotations", "categories"):
            if key not in self.seen:
                raise DataError(f"{self.path}: key '{key}' is missing: expected a COCO-format annotation file")
        if not self.image_names:
            raise DataError(f"{self.path}: 'images' is empty: expected at least one image; check the file")
        if not self.categories:
            raise DataError(f"{self.path}: 'categories' is empty: expected at least one class; check the file")

    def _category(self, item: dict[str, Any]) -> None:
        number = self._id(item, "id", f"category number {len(self.categories) + 1} of the list")
        name = item.get("name")
        if not isinstance(name, str) or not name.strip() or _UNFIT_FOR_NAMES.search(name):
            raise DataError(
                f"{self.path}: category {number}: name is {_shown(name)}: expected text without control characters; "
                "correct it"
            )
        if number in self.categories:
            raise DataError(
                f"{self.path}: category id {number} occurs twice ('{self.categories[number]}' and '{name}'): "
                "expected unique ids; renumber one"
            )
        if name in self.category_names:
            raise DataError(f"{self.path}: category name '{name}' occurs twice: expected unique names; rename one")
        self.categories[number] = name
        self.category_names.add(name)

    def _image(self, item: dict[str, Any]) -> None:
        number = self._id(item, "id", f"image number {len(self.image_names) + 1} of the list")
        name = item.get("file_name")
        if not isinstance(name, str) or not _stays_inside(name):
            raise DataError(
                f"{self.path}: image {number}: file_name is {_shown(name)}: expected a path below the image folder "
                "(no '..', no leading '/', no backslash, no control characters); correct it"
            )
        if number in self.image_names:
            raise DataError(
                f"{self.path}: image id {number} occurs twice ('{self.image_names[number]}' and '{name}'): "
                "expected unique ids; remove or renumber one"
            )
        self.image_names[number] = name
        for side in ("width", "height"):
            value = item.get(side)
            if type(value) is not int or not 0 < value <= _LARGEST_SIDE:
                raise DataError(
                    f"{self.path}: image {number} ('{name}'): {side} is {_shown(value)}: expected a whole number of "
                    f"pixels from 1 to {_LARGEST_SIDE}; correct it"
                )
            self.sizes.append(value)

    def _annotation(self, item: dict[str, Any]) -> None:
        number = self._id(item, "id", f"annotation number {len(self.flags) + 1} of the list")
        image, category = (self._id(item, key, f"annotation {number}") for key in ("image_id", "category_id"))
        box = item.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_usable_number, box)):
            raise self._bad_box(number, image, box, "expected four finite numbers x, y, width, height")
        if box[2] < 0 or box[3] < 0:
            raise self._bad_box(number, image, box, "expected a width and height of 0 or more")
        area: Any = item.get("area")
        usable = _is_usable_number(area) and area >= 0
        flags = 0
        for bit, name in enumerate(FLAGS):
            flag = item.get(name, 0)
            if flag not in (0, 1):
                raise DataError(
                    f"{self.path}: annotation {number}: {name} is {_shown(flag)}: expected 0 or 1; correct it"
                )
            flags |= int(flag) << bit
        self.numbers.extend((image, category, number))
        self.boxes.extend(box)
        self.areas.append(area if usable else math.nan)
        self.flags.append(flags)

    def _bad_box(self, annotation: int, image: int, box: object, expected: str) -> DataError:
        return DataError(
            f"{self.path}: annotation {annotation} of image {image}: bbox is {_shown(box)}: {expected}; "
            "correct or remove the annotation"
        )

    def _id(self, item: dict[str, Any], key: str, owner: str) -> int:
        value = item.get(key)
        if type(value) is not int or not 0 <= value <= _LARGEST_ID:
            raise DataError(
                f"{self.path}: {owner}: {key} is {_shown(value)}: expected a whole number of 0 or more; correct it"
            )
        return value

    def columns(self, categories: tuple[Category, ...], repairs: Repairs) -> Annotations:
        image_ids = np.fromiter(self.image_names, dtype=np.int64, count=len(self.image_names))
        numbers = np.frombuffer(self.numbers, dtype=np.int64).reshape(-1, 3)
        rows = self._places(image_ids, numbers[:, 0], numbers[:, 2], "image_id", "image")
        raw_ids = np.array([category.id for category in categories], dtype=np.int64)
        labels = self._places(raw_ids, numbers[:, 1], numbers[:, 2], "category_id", "category")
        by_image = np.argsort(rows, kind="stable")
        boxes = np.frombuffer(self.boxes, dtype=np.float64).reshape(-1, 4)[by_image]
        annotation_ids = numbers[by_image, 2]
        sizes = np.frombuffer(self.sizes, dtype=np.int64).reshape(-1, 2)
        return Annotations(
            path=self.path,
            categories=categories,
            image_ids=image_ids,
            file_names=list(self.image_names.values()),
            widths=sizes[:, 0].copy(),
            heights=sizes[:, 1].copy(),
            box_offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(image_ids)))]),
            boxes=boxes,
            areas=_mend_areas(np.frombuffer(self.areas, dtype=np.float64)[by_image], boxes, annotation_ids, repairs),
            labels=labels[by_image].astype(np.int32),
            flags=np.frombuffer(self.flags, dtype=np.uint8)[by_image],
            annotation_ids=_mend_ids(annotation_ids, repairs),
        )

    def _places(
        self,
        known: NDArray[np.int64],
        wanted: NDArray[np.int64],
        annotations: NDArray[np.int64],
        key: str,
        kind: str,
    ) -> NDArray[np.int64]:
        """Place of every wanted id in `known`; an id that is not there is a DataError."""
        order = np.argsort(known)
        places = order[np.searchsorted(known[order], wanted).clip(max=len(known) - 1)]
        unknown = np.flatnonzero(known[places] != wanted)
        if len(unknown):
            first = int(unknown[0])
            raise DataError(
                f"{self.path}: annotation {annotations[first]}: {key} is {wanted[first]}, an unknown {kind} id "
                f"({len(unknown)} such annotations): add the {kind} to the file or remove the annotation"
            )
        return places


def _mend_names(reader: _Reader, format: AnnotationFormat, repairs: Repairs) -> tuple[Category, ...]:
    """Categories in order of id; under `objects365` misspelt names are corrected and other tables refused."""
    found = [Category(number, name) for number, name in sorted(reader.categories.items())]
    if format == "coco":
        return tuple(found)
    official = {category.id: category.name for category in objects365_categories()}
    misspelt = objects365_misspelt()
    mended = []
    for category in found:
        name = misspelt.get(category.name, category.name)
        if official.get(category.id) != name:
            raise DataError(
                f"{reader.path}: category {category.id} is '{category.name}', in Objects365 v2 it is "
                f"'{official.get(category.id, 'unknown')}': use the v2 files (zhiyuan_objv2_*.json) or --format coco"
            )
        if name != category.name:
            repairs.add("category_names_corrected", f"category {category.id}: '{category.name}' -> '{name}'")
        mended.append(Category(category.id, name))
    return tuple(mended)


def _mend_areas(
    areas: NDArray[np.float64], boxes: NDArray[np.float64], ids: NDArray[np.int64], repairs: Repairs
) -> NDArray[np.float64]:
    missing = np.flatnonzero(np.isnan(areas))
    for row in missing:
        repairs.add("areas_from_boxes", f"annotation {ids[row]}")
    areas = areas.copy()
    areas[missing] = boxes[missing, 2] * boxes[missing, 3]
    return areas


def _mend_ids(ids: NDArray[np.int64], repairs: Repairs) -> NDArray[np.int64]:
    """COCO evaluation needs unique ids above 0; where the file's are not, all boxes are numbered anew."""
    values, counts = np.unique(ids, return_counts=True)
    if len(values) == len(ids) and (not len(ids) or values[0] > 0):
        return ids
    culprit = 0 if values[0] == 0 else int(values[counts > 1][0])
    repairs.add("annotation_ids_renumbered", f"annotation id {culprit} is 0 or occurs twice; all were numbered anew")
    return np.arange(1, len(ids) + 1, dtype=np.int64)


def _is_usable_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < _LARGEST_ID)


def _stays_inside(name: str) -> bool:
    if not name.strip() or name.startswith("/") or "\\" in name or _UNFIT_FOR_NAMES.search(name):
        return False
    return ".." not in PurePosixPath(name).parts


def _shown(value: object) -> str:
    text = repr(value)
    return "missing" if value is None else text if len(text) <= 80 else text[:77] + "..."
