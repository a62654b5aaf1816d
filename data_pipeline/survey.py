"""Before anything is written: finds every image on disk, reads its header, and fits the boxes to its true size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import AnnotationFormat, Annotations, Repairs
from data_pipeline.decode import ImageHeader, read_header
from data_pipeline.objects365 import KNOWN_MISSING, layout_folders
from data_pipeline.selection import keep_images
from data_pipeline.tasks import LocalProcesses, Runner
from dino_scale.errors import DataError

HEADER_BYTES = 1 << 16  # enough for nearly every header; the whole file is read where it is not
_CHUNK = 512  # images whose headers are read as one task
_SORTED_TOGETHER = 1 << 16  # images whose boxes are compared at once
_COLUMNS = ("root", "depth", "width", "height", "plain", "size", "modified")


@dataclass(frozen=True)
class Survey:
    """Annotations that agree with the images on disk, and where those are.

    plain_jpeg: (N,) bool, can be stored as it is. sizes: (N,) bytes. modified: (N,) nanoseconds.
    """

    annotations: Annotations
    plain_jpeg: NDArray[np.bool_]
    sizes: NDArray[np.int64]
    modified: NDArray[np.int64]
    _roots: tuple[Path, ...]
    _places: NDArray[np.int64]  # (N, 2): which root, and how many last parts of the name lie below it

    def path(self, row: int) -> Path:
        root, depth = self._places[row].tolist()
        return _below(self._roots[root], PurePosixPath(self.annotations.file_names[row]), depth)


@dataclass(frozen=True)
class SurveyOptions:
    """skip_unreadable: images that are missing or no images are left out and counted instead of being errors."""

    format: AnnotationFormat = "coco"
    skip_unreadable: bool = False


def survey(
    annotations: Annotations,
    roots: Sequence[Path],
    repairs: Repairs,
    options: SurveyOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    runner: Runner | None = None,
) -> Survey:
    """Raises DataError for a missing image, one that is no image, and a box outside its image.

    Under `objects365` the files known to be missing are left out, boxes outside their image and exact repetitions of
    boxes are dropped, all counted; elsewhere repetitions are counted and stay. progress: told how many headers of how
    many have been read. runner: who reads the headers; default: this process.
    """
    options = options or SurveyOptions()
    runner = runner or LocalProcesses()
    known = options.format == "objects365"
    folders = layout_folders(list(roots)) if known else list(roots)
    tasks = _header_tasks(annotations, tuple(folders), options)
    pieces = []
    done = 0
    for piece, problems in runner.map(_read_headers, tasks):
        repairs.add_all(problems)
        pieces.append(piece)
        done += len(piece)
        if progress:
            progress(done, len(annotations))
    table = np.concatenate(pieces)
    found = np.flatnonzero(table[:, 0] >= 0)
    if not len(found):
        raise DataError(f"{annotations.path}: no image of the file can be used: check --images")
    kept, table = keep_images(annotations, found), table[found]
    column = dict(zip(_COLUMNS, table.T.copy(), strict=True))
    sized = _true_sizes(kept, column["width"], column["height"], repairs)
    fitted = fit_boxes(sized, repairs, drop_outside=known)
    fitted = _without_repetitions(fitted, repairs) if known else _with_repetitions_told(fitted, repairs)
    places = np.stack([column["root"], column["depth"]], axis=1)
    return Survey(fitted, column["plain"] != 0, column["size"], column["modified"], tuple(folders), places)


@dataclass(frozen=True)
class _HeaderTask:
    annotations: Path
    names: list[str]
    ids: list[int]
    roots: tuple[Path, ...]
    options: SurveyOptions


def _header_tasks(annotations: Annotations, roots: tuple[Path, ...], options: SurveyOptions) -> Iterator[_HeaderTask]:
    for start in range(0, len(annotations), _CHUNK):
        rows = slice(start, start + _CHUNK)
        ids = annotations.image_ids[rows].tolist()
        yield _HeaderTask(annotations.path, annotations.file_names[rows], ids, roots, options)


def _read_headers(task: _HeaderTask) -> tuple[NDArray[np.int64], Repairs]:
    """(n, len(_COLUMNS)) facts of every image, -1 throughout for those left out."""
    table = np.full((len(task.names), len(_COLUMNS)), -1, dtype=np.int64)
    repairs = Repairs()
    for row, (name, number) in enumerate(zip(task.names, task.ids, strict=True)):
        try:
            place = find_image(PurePosixPath(name), task.roots)
            if place is None:
                _note_missing(task, name, number, repairs)
                continue
            path = _below(task.roots[place[0]], PurePosixPath(name), place[1])
            header, size, modified = _header(path, number)
        except DataError as error:
            if not task.options.skip_unreadable:
                raise
            repairs.add("images_unreadable_skipped", str(error))
            continue
        table[row] = (*place, header.width, header.height, header.plain_jpeg, size, modified)
    return table, repairs


def _note_missing(task: _HeaderTask, name: str, number: int, repairs: Repairs) -> None:
    if task.options.format == "objects365" and PurePosixPath(name).name in KNOWN_MISSING:
        repairs.add("images_known_missing_skipped", name)
        return
    places = ", ".join(str(root) for root in task.roots)
    raise DataError(
        f"{task.annotations}: image {number} ('{name}') is missing in {places}: "
        "check --images or remove the image from the file"
    )


def find_image(name: PurePosixPath, roots: Sequence[Path]) -> tuple[int, int] | None:
    """Where an image lies: the number of the folder, and how many last parts of the name lie below it.

    Objects365 writes `images/v1/patch8/x.jpg`; downloads keep all, some or none of those folders.
    """
    for number, root in enumerate(roots):
        for depth in range(len(name.parts), 0, -1):
            if _below(root, name, depth).is_file():
                return number, depth
    return None


def _below(root: Path, name: PurePosixPath, depth: int) -> Path:
    return Path(root, *name.parts[-depth:])


def _header(path: Path, number: int) -> tuple[ImageHeader, int, int]:
    """The header, the size in bytes and the time of the last change."""
    try:
        facts = path.stat()
        with open(path, "rb") as file:
            data = file.read(HEADER_BYTES)
            try:
                header = read_header(data)
            except DataError:
                header = read_header(data + file.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file's permissions") from None
    except DataError as error:
        raise DataError(f"{path}: image {number} {error}") from None
    return header, facts.st_size, facts.st_mtime_ns


def _true_sizes(
    annotations: Annotations, widths: NDArray[np.int64], heights: NDArray[np.int64], repairs: Repairs
) -> Annotations:
    wrong = (annotations.widths != widths) | (annotations.heights != heights)
    for row in np.flatnonzero(wrong).tolist():
        repairs.add(
            "sizes_from_file",
            f"{annotations.file_names[row]}: {annotations.widths[row]} x {annotations.heights[row]} stated, "
            f"{widths[row]} x {heights[row]} found",
        )
    return replace(annotations, widths=widths, heights=heights)


def fit_boxes(annotations: Annotations, repairs: Repairs, drop_outside: bool = False) -> Annotations:
    """Clips boxes that stick out of their image and drops boxes without width or height, both counted.

    A box that lies wholly outside its image is a DataError, or with `drop_outside` dropped and counted.
    """
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.box_offsets))
    size = np.stack([annotations.widths[image], annotations.heights[image]], axis=1).astype(np.float64)
    corner, extent = annotations.boxes[:, :2], annotations.boxes[:, 2:]
    low = np.maximum(corner, 0.0)
    high = np.minimum(corner + extent, size)
    empty = (extent == 0).any(axis=1)
    outside = (high <= low).any(axis=1) & ~empty
    if not drop_outside:
        _refuse_outside(annotations, image, np.flatnonzero(outside))
    clipped = ((corner < 0) | (corner + extent > size)).any(axis=1) & ~empty & ~outside
    boxes = annotations.boxes.copy()
    boxes[clipped] = np.concatenate([low, high - low], axis=1)[clipped]
    areas = annotations.areas.copy()
    areas[clipped] = np.minimum(areas[clipped], boxes[clipped, 2] * boxes[clipped, 3])
    kinds = {"boxes_clipped": clipped, "boxes_without_size_dropped": empty, "boxes_outside_dropped": outside}
    for kind, rows in kinds.items():
        _note_boxes(annotations, kind, np.flatnonzero(rows), repairs)
    return _select(annotations, boxes, areas, image, ~empty & ~outside)


def _without_repetitions(annotations: Annotations, repairs: Repairs) -> Annotations:
    """Of boxes with the same image, class, coordinates and flags only the first stays."""
    image, repeated = _repeated(annotations)
    _note_boxes(annotations, "boxes_repeated_dropped", np.flatnonzero(repeated), repairs)
    return _select(annotations, annotations.boxes, annotations.areas, image, ~repeated)


def _with_repetitions_told(annotations: Annotations, repairs: Repairs) -> Annotations:
    """All stay: COCO's numbers are those of its files as published, and in one's own files two may be meant."""
    _note_boxes(annotations, "boxes_repeated_kept", np.flatnonzero(_repeated(annotations)[1]), repairs)
    return annotations


def _repeated(annotations: Annotations) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(T,) place of each box's image, and (T,) whether an earlier box has the same image, class, coordinates, flags."""
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.box_offsets))
    repeated = np.zeros(len(image), dtype=bool)
    for first in range(0, len(annotations), _SORTED_TOGETHER):  # all at once would take gigabytes
        last = min(first + _SORTED_TOGETHER, len(annotations))
        rows = slice(int(annotations.box_offsets[first]), int(annotations.box_offsets[last]))
        keys = np.column_stack(
            [image[rows], annotations.labels[rows], annotations.flags[rows], annotations.boxes[rows]]
        )  # fmt: skip
        order = np.lexsort(keys.T[::-1])  # stable: of equal rows the first of the file comes first
        repeated[rows][order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    return image, repeated


def _note_boxes(annotations: Annotations, kind: str, rows: NDArray[np.int64], repairs: Repairs) -> None:
    for row in rows.tolist():
        repairs.add(kind, f"annotation {annotations.annotation_ids[row]}: bbox {annotations.boxes[row].tolist()}")


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
