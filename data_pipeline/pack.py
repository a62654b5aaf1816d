"""Raw folders to WebDataset shards with an index: `KEY.jpg` + `KEY.json` in tar files, byte for byte reproducible.

The samples are shuffled once for the whole dataset. Everything is written into a folder beside the target, which is
committed by one rename: a failure or a kill leaves no half-made dataset.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import FLAGS, AnnotationFormat, Annotations, Repairs, read_annotations
from data_pipeline.decode import decode, encode_jpeg
from data_pipeline.index import BOX_COLUMNS, SAMPLE_COLUMNS, sample_key
from data_pipeline.manifest import REPORT, Manifest, describe_file
from data_pipeline.order import epoch_order
from data_pipeline.survey import Survey, survey
from dino_scale.errors import DataError, UserError

os.environ["WDS_SECURE"] = "1"  # read on import: no pipes, no URLs that run commands
import webdataset

Progress = Callable[[int, int], None]  # samples done, samples in all
Verify = Literal["decode", "header"]
SHARD_BYTES = 512_000_000  # a shard is closed when it has grown to this


@dataclass(frozen=True)
class PackReport:
    """What was written. repairs: how often each kind was needed; report.json lists places."""

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
) -> PackReport:
    """Packs one annotation file and the folders of its images into the new folder `out`.

    verify: `decode` decodes every image in full, `header` trusts what lies behind the header.
    Raises UserError where `out` exists, DataError where the input cannot be used; nothing is left behind then.
    """
    out = Path(out).absolute()
    if out.exists():
        raise UserError(f"{out}: exists already; expected a new folder: give another --out or remove it first")
    if samples_per_shard < 1:
        raise UserError(f"samples per shard is {samples_per_shard}: expected 1 or more")
    _check_folders(images)
    repairs = Repairs()
    found = survey(read_annotations(annotations, format, repairs), [Path(root) for root in images], repairs)
    if not len(found.annotations.boxes):
        raise DataError(f"{annotations}: holds no usable box: expected at least one; check the file")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        (partial / "index").mkdir(parents=True)
        order = epoch_order(len(found.annotations), seed, 0)
        writer = _Writer(partial, found, order, verify, repairs)
        writer.write_shards(samples_per_shard, progress)
        writer.write_index()
        source: dict[str, str | int] = {"format": format, "seed": seed, "annotations": Path(annotations).name}
        manifest = writer.manifest(source)
        manifest.write(partial)
        _write_report(partial, repairs)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PackReport(out, manifest.samples, manifest.boxes, len(manifest.shards), manifest.digest, repairs.counts)


def _check_folders(images: Sequence[Path]) -> None:
    if not images:
        raise UserError("no image folder is given: expected at least one --images")
    for root in images:
        if not Path(root).is_dir():
            raise UserError(f"{root}: is no folder: expected a folder of images; check --images")


class _Writer:
    """Writes the samples of a survey in a given order and notes where each one went."""

    def __init__(self, folder: Path, found: Survey, order: NDArray[np.int64], verify: Verify, repairs: Repairs) -> None:
        self.folder = folder
        self.found = found
        self.order = order
        self.verify = verify
        self.repairs = repairs
        self.shards: list[str] = []
        self.checksums: list[int] = []
        self.places: list[tuple[int, int, int]] = []  # shard, offset, size of each image

    def write_shards(self, samples_per_shard: int, progress: Progress | None) -> None:
        with webdataset.ShardWriter(
            "shard-%05d.tar",
            maxcount=samples_per_shard,
            maxsize=SHARD_BYTES,
            opener=self._open_shard,
            post=self._close_shard,
            verbose=0,
            encoder=False,
            mtime=0,
        ) as writer:
            for done, row in enumerate(self.order.tolist(), start=1):
                image = self._image_bytes(row)
                self.checksums.append(zlib.crc32(image))
                content = json.dumps(describe_sample(self.found.annotations, row), separators=(",", ":"))
                key = sample_key(int(self.found.annotations.image_ids[row]))
                writer.write({"__key__": key, "jpg": image, "json": content.encode()})
                if progress:
                    progress(done, len(self.order))

    def _open_shard(self, name: str) -> BinaryIO:
        """Called by the shard writer, whose own way to open files is closed by WDS_SECURE."""
        self.shards.append(name)
        self.shard_file = open(self.folder / name, "wb")  # noqa: SIM115 (closed in _close_shard)
        return self.shard_file

    def _close_shard(self, name: str) -> None:
        """Called by the shard writer after each shard: notes where its images lie."""
        self.shard_file.close()
        with tarfile.open(self.folder / name, "r:") as shard:
            self.places += [
                (len(self.shards) - 1, member.offset_data, member.size)
                for member in shard
                if member.name.endswith(".jpg")
            ]

    def _image_bytes(self, row: int) -> bytes:
        """The file's own bytes where they are a plain JPEG, otherwise its pixels encoded anew."""
        path, plain = self.found.paths[row], self.found.plain_jpeg[row]
        try:
            data = path.read_bytes()
            if plain and self.verify == "header":
                return data
            pixels = decode(data)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}): check the file") from None
        except DataError as error:
            raise DataError(f"{path}: image {self.found.annotations.image_ids[row]} {error}") from None
        if plain:
            return data
        self.repairs.add("images_reencoded_as_jpeg", self.found.annotations.file_names[row])
        return encode_jpeg(pixels)

    def write_index(self) -> None:
        source, order = self.found.annotations, self.order
        starts, counts = source.box_offsets[:-1][order], np.diff(source.box_offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        places = np.array(self.places, dtype=np.int64)
        columns: dict[str, NDArray[Any]] = {
            "image_ids": source.image_ids[order],
            "widths": source.widths[order],
            "heights": source.heights[order],
            "shards": places[:, 0],
            "image_offsets": places[:, 1],
            "image_sizes": places[:, 2],
            "image_checksums": np.array(self.checksums),
            "areas": source.areas[rows],
            "labels": source.labels[rows],
            "flags": source.flags[rows],
            "annotation_ids": source.annotation_ids[rows],
        }
        for name, dtype in {**SAMPLE_COLUMNS, **BOX_COLUMNS}.items():
            self._save(name, columns[name].astype(dtype))
        self._save("boxes", source.boxes[rows].astype("<f8"))
        self._save("box_offsets", offsets.astype("<i8"))
        self._save("file_names", np.array([source.file_names[row].encode() for row in order.tolist()]))

    def _save(self, name: str, column: NDArray[Any]) -> None:
        np.save(self.folder / "index" / f"{name}.npy", column, allow_pickle=False)

    def manifest(self, source: dict[str, str | int]) -> Manifest:
        columns = sorted(f"index/{path.name}" for path in (self.folder / "index").iterdir())
        return Manifest(
            samples=len(self.order),
            boxes=len(self.found.annotations.boxes),
            categories=self.found.annotations.categories,
            shards=tuple(describe_file(self.folder, name) for name in self.shards),
            columns=tuple(describe_file(self.folder, name) for name in columns),
            source=source,
        )


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


def _write_report(folder: Path, repairs: Repairs) -> None:
    content = {
        "repairs": {
            kind: {"count": count, "first": repairs.examples[kind]} for kind, count in sorted(repairs.counts.items())
        }
    }
    (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
