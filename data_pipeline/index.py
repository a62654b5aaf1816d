"""The index of a packed dataset: columns (memory-mapped) that know every sample's place, size and boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.annotations import CROWD, MOST_BOXES
from data_pipeline.manifest import REMEDY, FileEntry, Manifest, describe_file, read_manifest
from data_pipeline.remote import RemoteFolder
from data_pipeline.shard_cache import ShardCache
from dino_scale.errors import DataError
from dino_scale.structures import Category

# column -> (dtype, columns of its rows); rows: one per sample, one per box, or one more than samples
SAMPLE_COLUMNS: dict[str, str] = {
    "image_ids": "<i8",
    "widths": "<i4",
    "heights": "<i4",
    "shards": "<i4",  # place in the manifest's list
    "image_offsets": "<i8",  # bytes from the start of the shard
    "image_sizes": "<i8",  # bytes
    "image_checksums": "<u4",  # CRC-32 of the image's bytes
}
BOX_COLUMNS: dict[str, str] = {
    "areas": "<f8",
    "labels": "<i4",
    "flags": "|u1",
    "annotation_ids": "<i8",
}


@dataclass(frozen=True)
class SampleBoxes:
    """Ground truth of one sample; n boxes. boxes: (n, 4) float64 x, y, width, height in pixels of the image on disk.
    labels: (n,) int32 contiguous. crowd: (n,) bool. areas: (n,) float64. annotation_ids: (n,) int64."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int32]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    annotation_ids: NDArray[np.int64]


class Index:
    """A packed dataset, opened. Pickles as its folder and digest: every process maps the columns for itself."""

    def __init__(self, folder: Path, manifest: Manifest, columns: Mapping[str, NDArray[Any]]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.columns = columns
        self.remote: RemoteFolder | None = None  # where the shards are, if not in the folder
        self.cache: ShardCache | None = None  # remote only: where shards are copied when they are first read

    @classmethod
    def open(cls, folder: Path, shards_here: bool = True) -> Index:
        """Opens a folder made by `pack`. Raises DataError where it is incomplete, altered or torn.

        shards_here: false where only the index has been copied (see `dataset.py`). Sizes of all files are compared;
        their digests only by `verify`, for reading terabytes takes hours.
        """
        folder = Path(folder).absolute()
        manifest = read_manifest(folder)
        for entry in (*(manifest.shards if shards_here else ()), *manifest.columns):
            _check_size(folder, entry)
        index = cls._map(folder, manifest)
        index._check_columns()
        return index

    @classmethod
    def _map(cls, folder: Path, manifest: Manifest) -> Index:
        return cls(
            folder,
            manifest,
            {Path(entry.name).stem: _map_column(folder / entry.name) for entry in manifest.columns},
        )

    def __len__(self) -> int:
        return self.manifest.samples

    def __reduce__(self) -> tuple[Any, ...]:
        """Shards are not looked at again: one that was lost since must not kill the process that unpickles."""
        return _reopen, (self.folder, self.digest, self.remote, self.cache)

    @property
    def categories(self) -> tuple[Category, ...]:
        """Classes in order of raw id; a contiguous id is a place in this list."""
        return self.manifest.categories

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def shard_names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.manifest.shards)

    def key(self, sample: int) -> str:
        """Name of a sample's members in its shard, without the extension."""
        return sample_key(int(self.columns["image_ids"][sample]))

    def image_id(self, sample: int) -> int:
        return int(self.columns["image_ids"][sample])

    def size(self, sample: int) -> tuple[int, int]:
        """(height, width) in pixels of the image on disk."""
        return int(self.columns["heights"][sample]), int(self.columns["widths"][sample])

    def file_name(self, sample: int) -> str:
        """As in the annotation file."""
        return bytes(self.columns["file_names"][sample]).decode()

    def boxes(self, sample: int) -> SampleBoxes:
        start, stop = self.columns["box_offsets"][sample : sample + 2]
        rows = slice(int(start), int(stop))
        return SampleBoxes(
            boxes=self.columns["boxes"][rows],
            labels=self.columns["labels"][rows],
            crowd=(self.columns["flags"][rows] & CROWD) != 0,
            areas=self.columns["areas"][rows],
            annotation_ids=self.columns["annotation_ids"][rows],
        )

    def sample_of(self, image_id: int) -> int:
        """The sample that shows an image. Raises DataError for an id that is not in the dataset."""
        order = self._by_image_id
        ids = self.columns["image_ids"]
        place = int(np.searchsorted(ids, image_id, sorter=order))
        if place == len(order) or ids[order[place]] != image_id:
            raise DataError(
                f"{self.folder}: image id {image_id} is not in this dataset: check that the right data is given"
            )
        return int(order[place])

    @cached_property
    def _by_image_id(self) -> NDArray[np.int64]:
        return np.argsort(self.columns["image_ids"])

    def verify(self) -> None:
        """Reads every file and compares its SHA-256. Raises DataError naming the first that differs."""
        for entry in (*self.manifest.shards, *self.manifest.columns, *self.manifest.reports):
            _check_size(self.folder, entry)
            found = describe_file(self.folder, entry.name)
            if found.sha256 != entry.sha256:
                raise DataError(
                    f"{self.folder / entry.name}: its SHA-256 is {found.sha256}, "
                    f"the manifest says {entry.sha256}: {REMEDY}"
                )

    def _check_columns(self) -> None:
        """Types, lengths and ranges, so that no later access can go astray."""
        n, t = self.manifest.samples, self.manifest.boxes
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            **{name: (dtype, (n,)) for name, dtype in SAMPLE_COLUMNS.items()},
            **{name: (dtype, (t,)) for name, dtype in BOX_COLUMNS.items()},
            "boxes": ("<f8", (t, 4)),
            "box_offsets": ("<i8", (n + 1,)),
        }
        for name, (dtype, shape) in expected.items():
            column = self.columns.get(name)
            if column is None or column.dtype != np.dtype(dtype) or column.shape != shape:
                raise DataError(f"{self.folder}/index/{name}.npy: expected {dtype} of shape {shape}: {REMEDY}")
        names = self.columns.get("file_names")
        if names is None or names.dtype.kind != "S" or names.shape != (n,):
            raise DataError(f"{self.folder}/index/file_names.npy: expected text of shape {(n,)}: {REMEDY}")
        self._check_ranges()

    def _check_ranges(self) -> None:
        shards, offsets = self.columns["shards"], self.columns["box_offsets"]
        sizes = np.array([entry.size for entry in self.manifest.shards], dtype=np.int64)
        start, length = self.columns["image_offsets"], self.columns["image_sizes"]
        if not len(shards) or shards.min() < 0 or shards.max() >= len(sizes):
            raise DataError(f"{self.folder}/index/shards.npy: names a shard that is not there: {REMEDY}")
        if start.min() < 0 or length.min() < 0 or (start + length > sizes[shards]).any():
            raise DataError(f"{self.folder}/index/image_offsets.npy: leads out of a shard: {REMEDY}")
        if offsets[0] != 0 or offsets[-1] != self.manifest.boxes or (np.diff(offsets) < 0).any():
            raise DataError(f"{self.folder}/index/box_offsets.npy: is not a list of row numbers: {REMEDY}")
        if (np.diff(offsets) > MOST_BOXES).any():
            raise DataError(
                f"{self.folder}/index/box_offsets.npy: has more than {MOST_BOXES} boxes of one image: {REMEDY}"
            )
        labels = self.columns["labels"]
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(self.categories)):
            raise DataError(f"{self.folder}/index/labels.npy: names a class that is not there: {REMEDY}")


def _reopen(folder: Path, digest: str, remote: RemoteFolder | None, cache: ShardCache | None) -> Index:
    manifest = read_manifest(folder)
    if manifest.digest != digest:
        raise DataError(f"{folder}: was packed anew while it was in use: start again")
    index = Index._map(folder, manifest)
    index.remote, index.cache = remote, cache
    return index


def sample_key(image_id: int) -> str:
    """Member name of an image in its shard, without the extension."""
    return f"{image_id:012d}"


def ground_truth(index: Index) -> dict[str, list[dict[str, Any]]]:
    """The dataset in COCO format, for evaluation: raw ids, crowd boxes and areas kept, images in order of id."""
    raw_ids = [category.id for category in index.categories]
    images, annotations = [], []
    for sample in index._by_image_id.tolist():
        height, width = index.size(sample)
        image_id = index.image_id(sample)
        images.append({"id": image_id, "file_name": index.file_name(sample), "width": width, "height": height})
        truth = index.boxes(sample)
        for row in range(len(truth.labels)):
            annotations.append(
                {
                    "id": int(truth.annotation_ids[row]),
                    "image_id": image_id,
                    "category_id": raw_ids[truth.labels[row]],
                    "bbox": truth.boxes[row].tolist(),
                    "area": float(truth.areas[row]),
                    "iscrowd": int(truth.crowd[row]),
                }
            )
    categories = [{"id": category.id, "name": category.name} for category in index.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def _check_size(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: is missing, the manifest lists it: restore it or {REMEDY}") from None
    if size != entry.size:
        raise DataError(f"{path}: has {size} bytes, the manifest says {entry.size}: restore it or {REMEDY}")


def _map_column(path: Path) -> NDArray[Any]:
    try:
        column: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # plain view: faster
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: is not a readable column ({error}): {REMEDY}") from None
    return column
