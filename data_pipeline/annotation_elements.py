"""The elements of a COCO-format annotation file, each checked as it passes and kept as plain numbers."""

from __future__ import annotations

import math
import re
from array import array
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.findings import Defect, Findings, shortened
from dino_scale.errors import DataError

FLAGS = ("iscrowd", "isfake", "isreflected")  # bit 0, 1, 2 of the flag column; the last two exist in Objects365 only
MOST_CATEGORIES = 30_000  # ImageNet-21k has 21,841; every class is a row of each class head
_LARGEST_ID = 2**62
_LARGEST_SIDE = 2**20
_LONGEST_PART = 255  # bytes: what file systems allow a file or folder to be named
_LONGEST_NAME = 2048  # bytes: leaves as much for the image folder, for paths end at 4096
_UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what no terminal and no file system should be given


class Elements:
    """Collects into flat arrays. What is refused (see `Findings`) is left out; its id is remembered, so that a box of
    a refused image or category is not told as one more defect."""

    def __init__(self, path: Path, findings: Findings) -> None:
        self.path = path
        self.findings = findings
        self.seen: set[str] = set()
        self.categories: dict[int, str] = {}
        self.category_names: set[str] = set()
        self.image_names: dict[int, str] = {}
        self.refused: dict[str, set[int]] = {"image": set(), "category": set()}
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
        try:
            if not isinstance(value, dict):
                raise self._defect(
                    "elements_that_are_no_objects",
                    f"'{key}' holds {_shown(value)}: expected objects; is this a COCO-format file?",
                )
            takers[key](value)
        except Defect as defect:
            self.findings.refused(defect)

    def check_complete(self) -> None:
        for key in ("images", "annotations", "categories"):
            if key not in self.seen:
                raise DataError(f"{self.path}: key '{key}' is missing: expected a COCO-format annotation file")
        if not self.image_names:
            raise DataError(f"{self.path}: 'images' is empty: expected at least one image; check the file")
        if not self.categories:
            raise DataError(f"{self.path}: 'categories' is empty: expected at least one class; check the file")

    def _defect(self, kind: str, problem: str) -> Defect:
        return Defect(f"{self.path}: {problem}", kind)

    def _category(self, item: dict[str, Any]) -> None:
        number = self._id(item, "id", f"category number {len(self.categories) + 1} of the list")
        name = item.get("name")
        if number in self.categories:
            raise self._defect(
                "categories_repeated",
                f"category id {number} occurs twice ({_shown(self.categories[number])} and {_shown(name)}): "
                "expected unique ids; renumber one",
            )
        self.refused["category"].add(number)
        if not isinstance(name, str) or not name.strip() or _UNFIT_FOR_NAMES.search(name):
            raise self._defect(
                "categories_of_unusable_name",
                f"category {number}: name is {_shown(name)}: expected text without control characters; correct it",
            )
        if name in self.category_names:
            raise self._defect(
                "categories_repeated", f"category name {_shown(name)} occurs twice: expected unique names; rename one"
            )
        if len(self.categories) == MOST_CATEGORIES:
            raise self._defect(
                "categories_too_many",
                f"category {number} ({_shown(name)}) is one more than {MOST_CATEGORIES}: expected at most so many; "
                "merge or remove some",
            )
        self.refused["category"].remove(number)
        self.categories[number] = name
        self.category_names.add(name)

    def _image(self, item: dict[str, Any]) -> None:
        number = self._id(item, "id", f"image number {len(self.image_names) + 1} of the list")
        name = item.get("file_name")
        if number in self.image_names:
            raise self._defect(
                "images_repeated",
                f"image id {number} occurs twice ({_shown(self.image_names[number])} and {_shown(name)}): "
                "expected unique ids; remove or renumber one",
            )
        self.refused["image"].add(number)
        if not isinstance(name, str) or not _stays_inside(name):
            raise self._defect(
                "images_of_unusable_name",
                f"image {number}: file_name is {_shown(name)}: expected a path below the image folder (no '..', no "
                f"leading '/', no backslash, no control characters, at most {_LONGEST_PART} bytes between slashes and "
                f"{_LONGEST_NAME} in all); correct it",
            )
        sizes = []
        for side in ("width", "height"):
            value = item.get(side)
            if type(value) is not int or not 0 < value <= _LARGEST_SIDE:
                raise self._defect(
                    "images_of_unusable_size",
                    f"image {number} ({_shown(name)}): {side} is {_shown(value)}: expected a whole number of pixels "
                    f"from 1 to {_LARGEST_SIDE}; correct it",
                )
            sizes.append(value)
        self.refused["image"].remove(number)
        self.image_names[number] = name
        self.sizes.extend(sizes)

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
                raise self._defect(
                    "flags_unusable", f"annotation {number}: {name} is {_shown(flag)}: expected 0 or 1; correct it"
                )
            flags |= int(flag) << bit
        self.numbers.extend((image, category, number))
        self.boxes.extend(box)
        self.areas.append(area if usable else math.nan)
        self.flags.append(flags)

    def _bad_box(self, annotation: int, image: int, box: object, expected: str) -> Defect:
        return self._defect(
            "boxes_unusable",
            f"annotation {annotation} of image {image}: bbox is {_shown(box)}: {expected}; "
            "correct or remove the annotation",
        )

    def _id(self, item: dict[str, Any], key: str, owner: str) -> int:
        value = item.get(key)
        if type(value) is not int or not 0 <= value <= _LARGEST_ID:
            raise self._defect(
                "ids_unusable",
                f"{owner}: {key} is {_shown(value)}: expected a whole number of 0 or more; correct it",
            )
        return value


def _is_usable_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < _LARGEST_ID)


def _stays_inside(name: str) -> bool:
    """Whether it names a file below a folder, on every file system."""
    if not name.strip() or name.startswith("/") or "\\" in name or _UNFIT_FOR_NAMES.search(name):
        return False
    parts = PurePosixPath(name).parts  # none at all of "." and "./"
    if not parts or ".." in parts or len(name.encode()) > _LONGEST_NAME:
        return False
    return all(len(part.encode()) <= _LONGEST_PART for part in parts)


def _shown(value: object) -> str:
    return "missing" if value is None else shortened(repr(value))
