"""Reads COCO-format annotation files (COCO, Objects365 v2, one's own) into columns, trusting nothing in them.

Repairs are counted and reported; what cannot be repaired without guessing is a defect: a DataError that names file, id,
value and remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotation_elements import Elements
from data_pipeline.categories import objects365_categories, objects365_misspelt
from data_pipeline.findings import Defect, Findings, Repair, shortened
from data_pipeline.json_stream import stream_object
from dino_scale.structures import Category

AnnotationFormat = Literal["coco", "objects365"]
CROWD = 1
# Of one image. Published sets have hundreds at most. The matching of an image costs 4 bytes for every box, query and
# decoder layer at the least: 0.25 GB here with the usual 900 queries and 7 predictions.
MOST_BOXES = 10_000


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
    findings: Findings,
    progress: Callable[[int, int], None] | None = None,
) -> Annotations:
    """Reads and checks an annotation file; tells `findings` what it mends and what cannot be mended.

    progress: told how many bytes of how many have been read. Raises DataError where the file cannot be read on.
    """
    elements = Elements(Path(path), findings)
    for key, value in stream_object(elements.path, progress):
        elements.take(key, value)
    elements.check_complete()
    return _columns(elements, _mend_names(elements, format), findings)


def _columns(elements: Elements, categories: tuple[Category, ...], findings: Findings) -> Annotations:
    image_ids = np.fromiter(elements.image_names, dtype=np.int64, count=len(elements.image_names))
    raw_ids = np.array([category.id for category in categories], dtype=np.int64)
    numbers = np.frombuffer(elements.numbers, dtype=np.int64).reshape(-1, 3)
    rows, image_known = _places(elements, image_ids, numbers[:, 0], numbers[:, 2], "image")
    labels, category_known = _places(elements, raw_ids, numbers[:, 1], numbers[:, 2], "category")
    by_image = np.argsort(rows, kind="stable")
    if not (image_known.all() and category_known.all()):
        by_image = by_image[(image_known & category_known)[by_image]]
    counts = np.bincount(rows[by_image], minlength=len(image_ids))
    file_names = list(elements.image_names.values())
    _refuse_crowded(elements, image_ids, counts)
    boxes = np.frombuffer(elements.boxes, dtype=np.float64).reshape(-1, 4)[by_image]
    sizes = np.frombuffer(elements.sizes, dtype=np.int64).reshape(-1, 2)
    found = Annotations(
        path=elements.path,
        categories=categories,
        image_ids=image_ids,
        file_names=file_names,
        widths=sizes[:, 0].copy(),
        heights=sizes[:, 1].copy(),
        box_offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes,
        areas=np.frombuffer(elements.areas, dtype=np.float64)[by_image],
        labels=labels[by_image].astype(np.int32),
        flags=np.frombuffer(elements.flags, dtype=np.uint8)[by_image],
        annotation_ids=numbers[by_image, 2],
    )
    return _mend_ids(_mend_areas(found, findings), findings)


def _places(
    elements: Elements, known: NDArray[np.int64], wanted: NDArray[np.int64], annotations: NDArray[np.int64], kind: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Place of every wanted id in `known`, and whether it is there at all; one that is not is a defect."""
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], wanted).clip(max=len(known) - 1)]
    there = known[places] == wanted
    for row in np.flatnonzero(~there).tolist():
        if int(wanted[row]) not in elements.refused[kind]:
            text = (
                f"{elements.path}: annotation {annotations[row]}: {kind}_id is {wanted[row]}, an unknown {kind} id: "
                f"add the {kind} to the file or remove the annotation"
            )
            elements.findings.refused(Defect(text, f"boxes_of_unknown_{kind}"))
    return places, there


def _refuse_crowded(elements: Elements, image_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    for row in np.flatnonzero(counts > MOST_BOXES).tolist():
        image = int(image_ids[row])
        name = shortened(elements.image_names[image])
        text = (
            f"{elements.path}: image {image} ('{name}') has {counts[row]} boxes: expected at most {MOST_BOXES} of one "
            "image; remove boxes or cut the image into parts"
        )
        elements.findings.refused(Defect(text, "images_with_too_many_boxes"))


def _mend_names(elements: Elements, format: AnnotationFormat) -> tuple[Category, ...]:
    """Categories in order of id; under `objects365` misspelt names are corrected and other tables refused."""
    found = [Category(number, name) for number, name in sorted(elements.categories.items())]
    if format == "coco":
        return tuple(found)
    official = {category.id: category.name for category in objects365_categories()}
    misspelt = objects365_misspelt()
    mended = []
    for category in found:
        name = misspelt.get(category.name, category.name)
        if official.get(category.id) != name:
            text = (
                f"{elements.path}: category {category.id} is '{category.name}', in Objects365 v2 it is "
                f"'{official.get(category.id, 'unknown')}': use the v2 files (zhiyuan_objv2_*.json) or --format coco"
            )
            elements.findings.refused(Defect(text, "categories_unlike_objects365"))
        if name != category.name:
            what = f"'{category.name}' -> '{name}'"
            elements.findings.mended(
                Repair("category_names_corrected", elements.path.name, "category", category.id, what)
            )
        mended.append(Category(category.id, name))
    return tuple(mended)


def _mend_areas(found: Annotations, findings: Findings) -> Annotations:
    missing = np.flatnonzero(np.isnan(found.areas))
    if not len(missing):
        return found
    areas = found.areas.copy()
    areas[missing] = found.boxes[missing, 2] * found.boxes[missing, 3]
    images = np.searchsorted(found.box_offsets, missing, side="right") - 1
    for row, image in zip(missing.tolist(), images.tolist(), strict=True):
        what, number = f"{areas[row]}, width x height", int(found.annotation_ids[row])
        findings.mended(Repair("areas_from_boxes", found.file_names[image], "annotation", number, what))
    return replace(found, areas=areas)


def _mend_ids(found: Annotations, findings: Findings) -> Annotations:
    """COCO evaluation needs unique ids above 0; where the file's are not, all boxes are numbered anew."""
    ids = found.annotation_ids
    values, counts = np.unique(ids, return_counts=True)
    if len(values) == len(ids) and (not len(ids) or values[0] > 0):
        return found
    culprit = 0 if values[0] == 0 else int(values[counts > 1][0])
    what = "the id is 0 or occurs twice; all were numbered anew"
    findings.mended(Repair("annotation_ids_renumbered", found.path.name, "annotation", culprit, what))
    return replace(found, annotation_ids=np.arange(1, len(ids) + 1, dtype=np.int64))
