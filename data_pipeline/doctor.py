"""Looks at data without changing it: raw folders as `pack` would see them, packed folders file by file."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.annotation_elements import FLAGS
from data_pipeline.annotations import AnnotationFormat
from data_pipeline.checksum import crc32
from data_pipeline.findings import Findings, Tally
from data_pipeline.index import Index
from data_pipeline.manifest import REMEDY
from data_pipeline.packing_plan import Plan, Progress, Selection, Source, report_of
from data_pipeline.shard_writer import Verify, examine_shard
from data_pipeline.tasks import LocalProcesses, Runner
from dino_scale.errors import DataError


@dataclass(frozen=True)
class Examination:
    """What `pack` would write: images, boxes, classes, shards (0 where it cannot be told), and the content of
    report.json. defects: what it would stop at; empty: nothing."""

    samples: int
    boxes: int
    categories: int
    shards: int
    report: dict[str, Any]
    defects: Tally


def examine(
    annotations: Path,
    images: Sequence[Path],
    format: AnnotationFormat = "coco",
    samples_per_shard: int = 3000,
    progress: Progress | None = None,
    verify: Verify = "decode",
    *,
    selection: Selection | None = None,
    workers: int = 1,
    runner: Runner | None = None,
) -> Examination:
    """All that `pack` would find in the same input, and nothing written.

    Where `pack` stops at its first defect, this goes on: each kind is counted, with its first places. An annotation
    file that cannot be read to its end, or of which nothing usable is left, is one defect more and the last.
    """
    selection, runner = selection or Selection(), runner or LocalProcesses(workers)
    source = Source(annotations, images, format, 0, samples_per_shard, verify, selection, runner, progress)
    findings = Findings(collect=True)
    counts = (0, 0, 0, 0)
    try:
        counts = _examine(source, findings)
    except DataError as error:
        findings.defects.add("cannot_go_on", error)
    return Examination(*counts, report_of(findings.repairs), findings.defects)


def _examine(source: Source, findings: Findings) -> tuple[int, int, int, int]:
    """Images, boxes, classes and shards."""
    plan = Plan.make(source, findings)
    rows: list[int] = []
    done = 0
    examined = source.runner.map(examine_shard, plan.tasks("", source))
    for planned, (kept, repairs, defects) in zip(plan.shards, examined, strict=True):
        findings.mended_all(repairs)
        findings.defects.add_all(defects)
        rows += kept
        done += len(planned)
        source.tell("decoding images", done, len(plan.order))
    found = plan.found.annotations
    boxes = int(np.diff(found.box_offsets)[np.array(rows, dtype=np.int64)].sum())
    return len(rows), boxes, len(found.categories), len(plan.shards)


def check_shards(folder: Path, progress: Callable[[int, int], None] | None = None) -> Index:
    """The opened dataset, after every byte of it was read and compared.

    Compared are the SHA-256 of every file with the manifest, and the members of every shard (names, places, image
    checksums, annotations) with the index. progress: told how many shards of how many are done. Raises DataError.
    """
    index = Index.open(folder)
    index.verify()
    shards = index.columns["shards"]
    for number in range(len(index.shard_names)):
        _check_members(index, number, np.flatnonzero(shards == number).tolist())
        if progress:
            progress(number + 1, len(index.shard_names))
    return index


def _check_members(index: Index, shard: int, samples: list[int]) -> None:
    path = index.folder / index.shard_names[shard]
    expected = [name for sample in samples for name in (f"{index.key(sample)}.jpg", f"{index.key(sample)}.json")]
    with tarfile.open(path, "r:") as tar:
        for place, member in enumerate(tar):
            if place >= len(expected) or member.name != expected[place] or not member.isreg():
                wanted = expected[place] if place < len(expected) else "its end"
                raise DataError(f"{path}: holds '{member.name}' where the index expects {wanted}: {REMEDY}")
            file = tar.extractfile(member)
            assert file is not None, "a regular member has content"
            _check_content(index, samples[place // 2], member, file.read(), path)
        if len(tar.getmembers()) != len(expected):
            raise DataError(f"{path}: ends after {len(tar.getmembers())} of {len(expected)} members: {REMEDY}")


def _check_content(index: Index, sample: int, member: tarfile.TarInfo, content: bytes, path: Path) -> None:
    columns = index.columns
    if member.name.endswith(".json"):
        same = json.loads(content) == _description(index, sample)
    else:
        place = (int(columns["image_offsets"][sample]), int(columns["image_sizes"][sample]))
        same = place == (member.offset_data, member.size) and crc32(content) == columns["image_checksums"][sample]
    if not same:
        raise DataError(f"{path}: member {member.name} is not what the index says: {REMEDY}")


def _description(index: Index, sample: int) -> dict[str, Any]:
    """A KEY.json from the index alone."""
    truth = index.boxes(sample)
    start, stop = index.columns["box_offsets"][sample : sample + 2].tolist()
    flags = index.columns["flags"][start:stop]
    height, width = index.size(sample)
    return {
        "image_id": index.image_id(sample),
        "file_name": index.file_name(sample),
        "width": width,
        "height": height,
        "annotation_ids": truth.annotation_ids.tolist(),
        "category_ids": [index.categories[label].id for label in truth.labels],
        "boxes": truth.boxes.tolist(),
        "areas": truth.areas.tolist(),
        **{name: ((flags >> bit) & 1).tolist() for bit, name in enumerate(FLAGS)},
    }
