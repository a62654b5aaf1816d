"""Before anything is written: finds every image on disk, reads its header, and fits the boxes to its true size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import AnnotationFormat, Annotations
from data_pipeline.decode import ImageHeader, read_header
from data_pipeline.findings import Defect, Findings, Repair, Tally, shortened
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
    """skip_unreadable: images that are missing or no images are left out and counted instead of being errors.
    collect: defects are counted instead of being errors, as in the `Findings` handed in."""

    format: AnnotationFormat = "coco"
    skip_unreadable: bool = False
    collect: bool = False


def survey(
    annotations: Annotations,
    roots: Sequence[Path],
    findings: Findings,
    options: SurveyOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    runner: Runner | None = None,
) -> Survey:
    """A missing image, one that is no image, and a box outside its image are defects.

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
    for piece, repairs, defects in runner.map(_read_headers, tasks):
        findings.mended_all(repairs)
        findings.defects.add_all(defects)
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
    sized = _true_sizes(kept, column["width"], column["height"], findings)
    fitted = fit_boxes(sized, findings, drop_outside=known)
    fitted = _without_repetitions(fitted, findings) if known else _with_repetitions_told(fitted, findings)
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


def _read_headers(task: _HeaderTask) -> tuple[NDArray[np.int64], list[Repair], Tally]:
    """(n, len(_COLUMNS)) facts of every image, -1 throughout for those left out; repairs, and defects if collected."""
    table = np.full((len(task.names), len(_COLUMNS)), -1, dtype=np.int64)
    repairs: list[Repair] = []
    findings = Findings(repairs.append, task.options.collect)
    for row, (name, number) in enumerate(zip(task.names, task.ids, strict=True)):
        try:
            facts = _facts(task, name, number)
        except Defect as defect:
            if task.options.skip_unreadable:
                findings.mended(Repair("images_unreadable_skipped", name, "image", number, defect.reason))
            else:
                findings.refused(defect)
            continue
        if facts is None:
            what = "no copy of Objects365 has this file"
            findings.mended(Repair("images_known_missing_skipped", name, "image", number, what))
        else:
            table[row] = facts
    return table, repairs, findings.defects


def _facts(task: _HeaderTask, name: str, number: int) -> tuple[int, ...] | None:
    """A row of _COLUMNS; None for an image that is known to be missing. Raises Defect."""
    place = find_image(PurePosixPath(name), task.roots)
    if place is None:
        if task.options.format == "objects365" and PurePosixPath(name).name in KNOWN_MISSING:
            return None
        places = ", ".join(str(root) for root in task.roots)
        text = (
            f"{task.annotations}: image {number} ('{shortened(name)}') is missing in {places}: "
            "check --images or remove the image from the file"
        )
        raise Defect(text, "images_missing", "is missing")
    path = _below(task.roots[place[0]], PurePosixPath(name), place[1])
    try:
        header, size, modified = _header(path)
    except DataError as error:
        raise Defect(f"{path}: image {number} {error}", "images_unreadable", str(error)) from None
    return (*place, header.width, header.height, int(header.plain_jpeg), size, modified)


def find_image(name: PurePosixPath, roots: Sequence[Path]) -> tuple[int, int] | None:
    """Where an image lies: the number of the folder, and how many last parts of the name lie below it.

    Objects365 writes `images/v1/patch8/x.jpg`; downloads keep all, some or none of those folders. Raises Defect where
    the system will not even say whether there is such a file.
    """
    for number, root in enumerate(roots):
        for depth in range(len(name.parts), 0, -1):
            try:
                if _below(root, name, depth).is_file():
                    return number, depth
            except OSError as error:  # no permission, or with the folder the name is too long
                reason = f"cannot be looked for ({error.strerror}): check the folder's permissions and the name"
                text = f"{root}: image '{shortened(str(name))}' {reason}"
                raise Defect(text, "images_unreadable", reason) from None
    return None


def _below(root: Path, name: PurePosixPath, depth: int) -> Path:
    return Path(root, *name.parts[-depth:])


def _header(path: Path) -> tuple[ImageHeader, int, int]:
    """The header, the size in bytes and the time of the last change. Raises DataError (message without the path)."""
    try:
        facts = path.stat()
        with open(path, "rb") as file:
            data = file.read(HEADER_BYTES)
            try:
                header = read_header(data)
            except DataError:
                header = read_header(data + file.read())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}): check the file's permissions") from None
    return header, facts.st_size, facts.st_mtime_ns


def _true_sizes(
    annotations: Annotations, widths: NDArray[np.int64], heights: NDArray[np.int64], findings: Findings
) -> Annotations:
    wrong = (annotations.widths != widths) | (annotations.heights != heights)
    for row in np.flatnonzero(wrong).tolist():
        stated = f"{annotations.widths[row]} x {annotations.heights[row]} stated"
        what, number = f"{stated}, {widths[row]} x {heights[row]} found", int(annotations.image_ids[row])
        findings.mended(Repair("sizes_from_file", annotations.file_names[row], "image", number, what))
    return replace(annotations, widths=widths, heights=heights)


def fit_boxes(annotations: Annotations, findings: Findings, drop_outside: bool = False) -> Annotations:
    """Clips boxes that stick out of their image and drops boxes without width or height, both counted.

    A box that lies wholly outside its image is a defect, or with `drop_outside` dropped and counted.
    """
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.box_offsets))
    size = np.stack([annotations.widths[image], annotations.heights[image]], axis=1).astype(np.float64)
    corner, extent = annotations.boxes[:, :2], annotations.boxes[:, 2:]
    low = np.maximum(corner, 0.0)
    high = np.minimum(corner + extent, size)
    empty = (extent == 0).any(axis=1)
    outside = (high <= low).any(axis=1) & ~empty
    if not drop_outside:
        _refuse_outside(annotations, image, np.flatnonzero(outside), findings)
    clipped = ((corner < 0) | (corner + extent > size)).any(axis=1) & ~empty & ~outside
    boxes = annotations.boxes.copy()
    boxes[clipped] = np.concatenate([low, high - low], axis=1)[clipped]
    areas = annotations.areas.copy()
    areas[clipped] = np.minimum(areas[clipped], boxes[clipped, 2] * boxes[clipped, 3])
    kinds = {"boxes_clipped": clipped, "boxes_without_size_dropped": empty}
    if drop_outside:
        kinds["boxes_outside_dropped"] = outside
    for kind, rows in kinds.items():
        _note_boxes(annotations, kind, image, np.flatnonzero(rows), findings)
    return _select(annotations, boxes, areas, image, ~empty & ~outside)


def _without_repetitions(annotations: Annotations, findings: Findings) -> Annotations:
    """Of boxes with the same image, class, coordinates and flags only the first stays."""
    image, repeated = _repeated(annotations)
    _note_boxes(annotations, "boxes_repeated_dropped", image, np.flatnonzero(repeated), findings)
    return _select(annotations, annotations.boxes, annotations.areas, image, ~repeated)


def _with_repetitions_told(annotations: Annotations, findings: Findings) -> Annotations:
    """All stay: COCO's numbers are those of its files as published, and in one's own files two may be meant."""
    image, repeated = _repeated(annotations)
    _note_boxes(annotations, "boxes_repeated_kept", image, np.flatnonzero(repeated), findings)
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


def _note_boxes(
    annotations: Annotations, kind: str, image: NDArray[np.int64], rows: NDArray[np.int64], findings: Findings
) -> None:
    for row in rows.tolist():
        file, number = annotations.file_names[image[row]], int(annotations.annotation_ids[row])
        findings.mended(Repair(kind, file, "annotation", number, f"bbox {annotations.boxes[row].tolist()}"))


def _refuse_outside(
    annotations: Annotations, image: NDArray[np.int64], rows: NDArray[np.int64], findings: Findings
) -> None:
    for row in rows.tolist():
        width, height = annotations.widths[image[row]], annotations.heights[image[row]]
        text = (
            f"{annotations.path}: annotation {annotations.annotation_ids[row]} of image "
            f"{annotations.image_ids[image[row]]}: bbox is {annotations.boxes[row].tolist()}, outside the image of "
            f"{width} x {height} pixels: correct or remove the annotation"
        )
        findings.refused(Defect(text, "boxes_outside"))


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
