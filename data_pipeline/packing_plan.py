"""What a packing will do, decided before anything is written: which images, in which order, in which shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotation_elements import FLAGS
from data_pipeline.annotations import AnnotationFormat, Annotations, read_annotations
from data_pipeline.findings import Findings, Tally
from data_pipeline.index import sample_key
from data_pipeline.order import epoch_order
from data_pipeline.selection import join, keep_images
from data_pipeline.shard_writer import Member, ShardTask, Verify
from data_pipeline.survey import Survey, SurveyOptions, survey
from data_pipeline.tasks import Runner
from dino_scale.errors import DataError, UserError

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
SHARD_BYTES = 512_000_000  # a shard is closed when the files in it have this many


@dataclass(frozen=True)
class Selection:
    """Which images of which files become the dataset.

    first: only the first images of the annotation file; 0: all.
    also, also_after: a second annotation file, of which all but the first `also_after` images are added. Objects365 is
        customarily trained on its training set and all validation images but the first 5,000.
    skip_unreadable: images that are missing or do not decode are left out and counted instead of being errors.
    """

    first: int = 0
    also: Path | None = None
    also_after: int = 0
    skip_unreadable: bool = False


@dataclass
class Source:
    """What packing was asked for."""

    annotations: Path
    images: Sequence[Path]
    format: AnnotationFormat
    seed: int
    samples_per_shard: int
    verify: Verify
    selection: Selection
    runner: Runner
    progress: Progress | None

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(f"samples per shard is {self.samples_per_shard}: expected 1 or more")
        for option in ("first", "also_after"):
            if getattr(self.selection, option) < 0:
                raise UserError(
                    f"--{option.replace('_', '-')} is {getattr(self.selection, option)}: expected 0 or more"
                )
        if not self.images:
            raise UserError("no image folder is given: expected at least one --images")
        for root in self.images:
            if not Path(root).is_dir():
                raise UserError(f"{root}: is no folder: expected a folder of images; check --images")

    def tell(self, phase: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(phase, done, total)

    def read(self, findings: Findings) -> Annotations:
        """The chosen images of the annotation file or files."""

        def told(done: int, total: int) -> None:
            self.tell("reading annotations", done, total)

        chosen = read_annotations(self.annotations, self.format, findings, told)
        if self.selection.first:
            chosen = keep_images(chosen, np.arange(min(self.selection.first, len(chosen))))
        if self.selection.also is not None:
            also = read_annotations(self.selection.also, self.format, findings, told)
            chosen = join(chosen, keep_images(also, np.arange(self.selection.also_after, len(also))), findings)
        return chosen


@dataclass(frozen=True)
class Plan:
    """The surveyed dataset, the order of its samples, and the rows that each shard will hold."""

    found: Survey
    order: NDArray[np.int64]
    shards: list[NDArray[np.int64]]
    findings: Findings

    @classmethod
    def make(cls, source: Source, findings: Findings) -> Plan:
        options = SurveyOptions(source.format, source.selection.skip_unreadable, findings.collect)
        found = survey(
            source.read(findings),
            [Path(root) for root in source.images],
            findings,
            options,
            lambda done, total: source.tell("reading headers", done, total),
            source.runner,
        )
        if not len(found.annotations.boxes):
            raise DataError(f"{source.annotations}: holds no usable box: expected at least one; check the file")
        order = epoch_order(len(found.annotations), source.seed, 0)
        return cls(found, order, _deal(order, found.sizes, source.samples_per_shard), findings)

    def tasks(self, folder: str, source: Source) -> Iterator[ShardTask]:
        skip, collect = source.selection.skip_unreadable, self.findings.collect
        for number, rows in enumerate(self.shards):
            members = tuple(self._member(row) for row in rows.tolist())
            yield ShardTask(number, folder, members, source.verify, skip, collect)

    def _member(self, row: int) -> Member:
        found, annotations = self.found, self.found.annotations
        image_id = int(annotations.image_ids[row])
        return Member(
            row=row,
            key=sample_key(image_id),
            image_id=image_id,
            path=str(found.path(row)),
            file_name=annotations.file_names[row],
            plain_jpeg=bool(found.plain_jpeg[row]),
            size=int(found.sizes[row]),
            modified=int(found.modified[row]),
            content=json.dumps(describe_sample(annotations, row), separators=(",", ":")),
        )


def _deal(order: NDArray[np.int64], sizes: NDArray[np.int64], samples_per_shard: int) -> list[NDArray[np.int64]]:
    """Rows of each shard: it is full with `samples_per_shard` samples or SHARD_BYTES bytes of files."""
    cuts = []
    start = bytes_so_far = 0
    for place, size in enumerate(sizes[order].tolist(), start=1):
        bytes_so_far += size
        if place - start == samples_per_shard or bytes_so_far >= SHARD_BYTES:
            cuts.append(place)
            start, bytes_so_far = place, 0
    pieces = np.split(order, cuts)
    return [piece for piece in pieces if len(piece)]


def describe_sample(annotations: Annotations, row: int) -> dict[str, Any]:
    """What the `KEY.json` of a sample holds: raw ids, boxes as x, y, width, height in pixels."""
    rows = slice(int(annotations.box_offsets[row]), int(annotations.box_offsets[row + 1]))
    flags = annotations.flags[rows]
    return {
        "image_id": int(annotations.image_ids[row]),
        "file_name": annotations.file_names[row],
        "width": int(annotations.widths[row]),
        "height": int(annotations.heights[row]),
        "annotation_ids": annotations.annotation_ids[rows].tolist(),
        "category_ids": [annotations.categories[label].id for label in annotations.labels[rows]],
        "boxes": annotations.boxes[rows].tolist(),
        "areas": annotations.areas[rows].tolist(),
        **{name: ((flags >> bit) & 1).tolist() for bit, name in enumerate(FLAGS)},
    }


def report_of(repairs: Tally) -> dict[str, Any]:
    """The content of report.json: how often each repair was needed, and the first places."""
    return {
        "repairs": {
            kind: {"count": count, "first": repairs.examples[kind]} for kind, count in sorted(repairs.counts.items())
        }
    }
