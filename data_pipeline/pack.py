"""Raw folders to WebDataset shards with an index: `KEY.jpg` + `KEY.json` in tar files, byte for byte reproducible.

The samples are shuffled once for the whole dataset and dealt to shards before any is written, so that the bytes are
the same for any number of processes. Everything is written into a hidden folder beside the target, which is committed
by one rename; finished shards stay there when packing is interrupted, and the next call goes on with the rest.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import AnnotationFormat, Annotations
from data_pipeline.findings import Findings, Repair
from data_pipeline.index import BOX_COLUMNS, SAMPLE_COLUMNS
from data_pipeline.manifest import REPAIRS, REPORT, Manifest, describe_file
from data_pipeline.packing_plan import Plan, Progress, Selection, Source, report_of
from data_pipeline.shard_writer import ATTEMPT, RECEIPTS, Receipt, Verify, write_shard
from data_pipeline.tasks import LocalProcesses, Runner
from dino_scale.errors import DataError, UserError

_LOCK = "lock"


@dataclass(frozen=True)
class PackReport:
    """What was written. repairs: how often each kind was needed; report.json has the first places of each kind,
    repairs.jsonl every one."""

    out: Path
    samples: int
    boxes: int
    shards: int
    digest: str
    repairs: dict[str, int]


def pack(
    annotations: Path,
    images: Sequence[Path],
    out: Path,
    format: AnnotationFormat = "coco",
    samples_per_shard: int = 3000,
    seed: int = 0,
    progress: Progress | None = None,
    verify: Verify = "decode",
    *,
    selection: Selection | None = None,
    workers: int = 1,
    runner: Runner | None = None,
    restart: bool = False,
) -> PackReport:
    """Packs one annotation file and the folders of its images into the new folder `out`.

    verify: `decode` decodes every image in full, `header` trusts what lies behind the header.
    workers: processes on this machine; runner: others to do the work instead (see `tasks.py`), which need the paths of
    images and `out` to mean the same to them. The result depends on neither.
    restart: forget shards of an interrupted call.
    Raises UserError where `out` exists, DataError where the input cannot be used; what is left behind then are whole
    shards in a hidden folder, if any.
    """
    out = Path(out).absolute()
    if out.exists():
        raise UserError(f"{out}: exists already; expected a new folder: give another --out or remove it first")
    selection, runner = selection or Selection(), runner or LocalProcesses(workers)
    source = Source(annotations, images, format, seed, samples_per_shard, verify, selection, runner, progress)
    with _partial_folder(out, restart) as partial:
        with open(partial / REPAIRS, "w", encoding="utf-8") as listing:
            findings = Findings(_line_by_line(listing))
            plan = Plan.make(source, findings)
            receipts = _write_shards(plan, partial, source)
        manifest = _finish(plan, partial, receipts, source)
        partial.rename(out)
    boxes, shards = manifest.boxes, len(manifest.shards)
    return PackReport(out, manifest.samples, boxes, shards, manifest.digest, findings.repairs.counts)


def _line_by_line(file: TextIO) -> Callable[[Repair], object]:
    """There may be as many repairs as boxes: each goes to the file at once."""
    return lambda repair: file.write(repair.to_json() + "\n")


@contextmanager
def _partial_folder(out: Path, restart: bool) -> Iterator[Path]:
    """The hidden folder beside `out`, locked; removed at the end where no finished shard is in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(exist_ok=True)
    with open(partial / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: is being packed by another process: wait for it or give another --out") from None
        for leftover in partial.glob(f"shard-*{ATTEMPT}*"):  # half a shard of a call that was killed
            leftover.unlink()
        if restart:
            _clear(partial)
        (partial / RECEIPTS).mkdir(exist_ok=True)
        try:
            yield partial
        finally:
            if partial.exists() and not any((partial / RECEIPTS).glob("*.json")):
                shutil.rmtree(partial)


def _clear(partial: Path) -> None:
    """Everything but the lock, which is held."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _write_shards(plan: Plan, partial: Path, source: Source) -> list[Receipt]:
    receipts = []
    done = 0
    for task, receipt in zip(
        plan.shards, source.runner.map(write_shard, plan.tasks(str(partial), source)), strict=True
    ):
        receipts.append(receipt)
        plan.findings.mended_all(receipt.repairs)
        done += len(task)
        source.tell("writing shards", done, len(plan.order))
    return receipts


def _finish(plan: Plan, partial: Path, receipts: list[Receipt], source: Source) -> Manifest:
    """Index, manifest and report beside the shards; everything else is removed."""
    names = {receipt.shard.name for receipt in receipts}
    shutil.rmtree(partial / "index", ignore_errors=True)
    (partial / "index").mkdir()
    order = np.array([row for receipt in receipts for row in receipt.rows], dtype=np.int64)
    boxes = _write_index(partial / "index", plan.found.annotations, order, receipts)
    if not boxes:
        raise DataError(f"{source.annotations}: no image with a box could be read: check the images")
    columns = sorted(f"index/{path.name}" for path in (partial / "index").iterdir())
    facts: dict[str, str | int] = {
        "format": source.format,
        "seed": source.seed,
        "annotations": Path(source.annotations).name,
    }
    if source.selection.first:
        facts["first"] = source.selection.first
    if source.selection.also is not None:
        facts |= {"also": Path(source.selection.also).name, "also_after": source.selection.also_after}
    text = json.dumps(report_of(plan.findings.repairs), indent=1) + "\n"
    (partial / REPORT).write_text(text, encoding="utf-8")
    manifest = Manifest(
        samples=len(order),
        boxes=boxes,
        categories=plan.found.annotations.categories,
        shards=tuple(receipt.shard for receipt in receipts),
        columns=tuple(describe_file(partial, name) for name in columns),
        source=facts,
        reports=tuple(describe_file(partial, name) for name in (REPAIRS, REPORT)),
    )
    manifest.write(partial)
    shutil.rmtree(partial / RECEIPTS)
    for path in partial.glob("shard-*"):  # of an earlier call with other input
        if path.name not in names:
            path.unlink()
    (partial / _LOCK).unlink()
    return manifest


def _write_index(folder: Path, source: Annotations, order: NDArray[np.int64], receipts: Sequence[Receipt]) -> int:
    """The columns of the samples in the order written; the number of their boxes."""
    starts, counts = source.box_offsets[:-1][order], np.diff(source.box_offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
    columns: dict[str, NDArray[Any]] = {
        "image_ids": source.image_ids[order],
        "widths": source.widths[order],
        "heights": source.heights[order],
        "shards": np.repeat(np.arange(len(receipts)), [len(receipt.rows) for receipt in receipts]),
        "image_offsets": np.array([offset for receipt in receipts for offset in receipt.offsets]),
        "image_sizes": np.array([size for receipt in receipts for size in receipt.sizes]),
        "image_checksums": np.array([checksum for receipt in receipts for checksum in receipt.checksums]),
        "areas": source.areas[rows],
        "labels": source.labels[rows],
        "flags": source.flags[rows],
        "annotation_ids": source.annotation_ids[rows],
    }
    typed = {name: columns[name].astype(dtype) for name, dtype in {**SAMPLE_COLUMNS, **BOX_COLUMNS}.items()}
    typed["boxes"] = source.boxes[rows].astype("<f8")
    typed["box_offsets"] = offsets.astype("<i8")
    typed["file_names"] = np.array([source.file_names[row].encode() for row in order.tolist()])
    for name, column in typed.items():
        np.save(folder / f"{name}.npy", column, allow_pickle=False)
    return int(offsets[-1])
