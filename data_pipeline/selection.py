"""Parts of annotation files: some images of one, or two of them as one dataset."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import Annotations
from data_pipeline.findings import Findings, Repair
from dino_scale.errors import DataError


def keep_images(annotations: Annotations, rows: NDArray[np.int64]) -> Annotations:
    """The images `rows` (ascending places in the file) with their boxes."""
    counts = np.diff(annotations.box_offsets)
    chosen = np.zeros(len(annotations), dtype=bool)
    chosen[rows] = True
    keep = np.repeat(chosen, counts)
    return replace(
        annotations,
        image_ids=annotations.image_ids[rows],
        file_names=[annotations.file_names[row] for row in rows.tolist()],
        widths=annotations.widths[rows],
        heights=annotations.heights[rows],
        box_offsets=np.concatenate([[0], np.cumsum(counts[rows])]),
        boxes=annotations.boxes[keep],
        areas=annotations.areas[keep],
        labels=annotations.labels[keep],
        flags=annotations.flags[keep],
        annotation_ids=annotations.annotation_ids[keep],
    )


def join(first: Annotations, second: Annotations, findings: Findings) -> Annotations:
    """Both as one dataset. Raises DataError where their categories differ or an image id is in both.

    Where an annotation id is in both, all boxes are numbered anew, counted as one repair.
    """
    if first.categories != second.categories:
        raise DataError(
            f"{second.path}: its categories differ from those of {first.path}: expected the same list to join them"
        )
    both = np.intersect1d(first.image_ids, second.image_ids)
    if len(both):
        raise DataError(
            f"{second.path}: image id {both[0]} is in {first.path} too ({len(both)} such ids): "
            "expected different images; renumber or remove them"
        )
    annotation_ids = np.concatenate([first.annotation_ids, second.annotation_ids])
    shared = np.intersect1d(first.annotation_ids, second.annotation_ids)
    if len(shared):
        what = f"the id is in {first.path.name} too; all were numbered anew"
        findings.mended(Repair("annotation_ids_renumbered", second.path.name, "annotation", int(shared[0]), what))
        annotation_ids = np.arange(1, len(annotation_ids) + 1, dtype=np.int64)
    return Annotations(
        path=first.path,
        categories=first.categories,
        image_ids=np.concatenate([first.image_ids, second.image_ids]),
        file_names=first.file_names + second.file_names,
        widths=np.concatenate([first.widths, second.widths]),
        heights=np.concatenate([first.heights, second.heights]),
        box_offsets=np.concatenate([first.box_offsets, second.box_offsets[1:] + first.box_offsets[-1]]),
        boxes=np.concatenate([first.boxes, second.boxes]),
        areas=np.concatenate([first.areas, second.areas]),
        labels=np.concatenate([first.labels, second.labels]),
        flags=np.concatenate([first.flags, second.flags]),
        annotation_ids=annotation_ids,
    )
