"""Before anything is written: finds every image on disk, reads its header, and fits the boxes to its true size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import Annotations, Repairs
from data_pipeline.decode import ImageHeader, read_header
from dino_scale.errors import DataError

HEADER_BYTES = 1 << 16  # enough for nearly every header; the whole file is read where it is not


@dataclass(frozen=True)
class Survey:
    """Annotations that agree with the images on disk, and where those are. plain_jpeg: can be stored as it is."""

    annotations: Annotations
    paths: list[Path]
    plain_jpeg: list[bool]


def survey(annotations: Annotations, roots: Sequence[Path], repairs: Repairs) -> Survey:
    """Raises DataError for a missing image, one that is no image, and a box outside its image."""
    paths = [find_image(annotations, row, roots) for row in range(len(annotations))]
    headers = [_header(annotations, row, path) for row, path in enumerate(paths)]
    for row, header in enumerate(headers):
        stated = (int(annotations.widths[row]), int(annotations.heights[row]))
        if stated != (header.width, header.height):
            name = annotations.file_names[row]
            repairs.add(
                "sizes_from_file", f"{name}: {stated[0]} x {stated[1]} stated, {header.width} x {header.height} found"
            )
    sized = replace(
        annotations,
        widths=np.array([header.width for header in headers], dtype=np.int64),
        heights=np.array([header.height for header in headers], dtype=np.int64),
    )
    return Survey(fit_boxes(sized, repairs), paths, [header.plain_jpeg for header in headers])


def find_image(annotations: Annotations, row: int, roots: Sequence[Path]) -> Path:
    """The file of an image: below one of the folders, by its full name, its last folder and name, or its name.

    Objects365 writes `images/v1/patch8/x.jpg`; downloads keep all, some or none of those folders.
    """
    name = PurePosixPath(annotations.file_names[row])
    for root in roots:
        for depth in range(len(name.parts), 0, -1):
            path = Path(root, *name.parts[-depth:])
            if path.is_file():
                return path
    places = ", ".join(str(root) for root in roots)
    raise DataError(
        f"{annotations.path}: image {annotations.image_ids[row]} ('{name}') is missing in {places}: "
        "check --images or remove the image from the file"
    )


def _header(annotations: Annotations, row: int, path: Path) -> ImageHeader:
    try:
        with open(path, "rb") as file:
            data = file.read(HEADER_BYTES)
            try:
                return read_header(data)
            except DataError:
                return read_header(data + file.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file's permissions") from None
    except DataError as error:
        raise DataError(f"{path}: image {annotations.image_ids[row]} {error}") from None


def fit_boxes(annotations: Annotations, repairs: Repairs) -> Annotations:
    """Clips boxes that stick out of their image and drops boxes without width or height, both counted.

    A box that lies wholly outside its image is a DataError.
    """
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.box_offsets))
    size = np.stack([annotations.widths[image], annotations.heights[image]], axis=1).astype(np.float64)
    corner, extent = annotations.boxes[:, :2], annotations.boxes[:, 2:]
    low = np.maximum(corner, 0.0)
    high = np.minimum(corner + extent, size)
    empty = (extent == 0).any(axis=1)
    _refuse_outside(annotations, image, np.flatnonzero((high <= low).any(axis=1) & ~empty))
    clipped = ((corner < 0) | (corner + extent > size)).any(axis=1) & ~empty
    boxes = annotations.boxes.copy()
    boxes[clipped] = np.concatenate([low, high - low], axis=1)[clipped]
    areas = annotations.areas.copy()
    areas[clipped] = np.minimum(areas[clipped], boxes[clipped, 2] * boxes[clipped, 3])
    for kind, rows in (("boxes_clipped", clipped), ("boxes_without_size_dropped", empty)):
        for row in np.flatnonzero(rows):
            repairs.add(kind, f"annotation {annotations.annotation_ids[row]}: bbox {annotations.boxes[row].tolist()}")
    return _select(annotations, boxes, areas, image, ~empty)


def _refuse_outside(annotations: Annotations, image: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
    if not len(rows):
        return
    row = int(rows[0])
    width, height = annotations.widths[image[row]], annotations.heights[image[row]]
    raise DataError(
        f"{annotations.path}: annotation {annotations.annotation_ids[row]} of image "
        f"{annotations.image_ids[image[row]]}: bbox is {annotations.boxes[row].tolist()}, outside the image of "
        f"{width} x {height} pixels ({len(rows)} such boxes): correct or remove the annotation"
    )


def _select(
    annotations: Annotations,
    boxes: NDArray[np.float64],
    areas: NDArray[np.float64],
    image: NDArray[np.int64],
    keep: NDArray[np.bool_],
) -> Annotations:
    counts = np.bincount(image[keep], minlength=len(annotations))
    return replace(
        annotations,
        box_offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes[keep],
        areas=areas[keep],
        labels=annotations.labels[keep],
        flags=annotations.flags[keep],
        annotation_ids=annotations.annotation_ids[keep],
    )
