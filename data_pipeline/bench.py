"""What the data path costs, as ratios measured in one run on the same files. CPU time of one process, best of several
interleaved repetitions: wall time would measure the neighbours on a shared machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.categories import objects365_categories
from data_pipeline.collate import Sample, collate
from data_pipeline.index import BOX_COLUMNS, SAMPLE_COLUMNS, Index
from data_pipeline.loader import StreamMode
from data_pipeline.manifest import FileEntry, Manifest
from data_pipeline.order import Draws, SampleStream, Stream
from data_pipeline.reader import Reader
from data_pipeline.size_order import SizePlannedStream
from data_pipeline.transforms import Plan, apply_to_image, sample_plan
from dino_scale.config.schema import AugmentationConfig

REPEATS = 5
READS = 2000  # samples read as bytes, at least
SIZES = 8192  # images whose padding is planned: a small dataset counts several times
LARGE = 1_800_000  # samples of Objects365 with most of its validation set
BOXES_PER_IMAGE = 14
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

# Plain webdataset as a user would write it. In a process of its own: ours forbids it to open anything.
_STREAM = """
import sys, time, webdataset
begin = time.process_time()
count = sum(len(row[0]) > 0 for row in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).to_tuple("jpg", "json"))
print(time.process_time() - begin, count)
"""
# What one loader process holds: opens the index, begins an epoch, looks at some samples.
_WORKER = """
import sys, time
from data_pipeline.index import Index
from data_pipeline.order import SampleStream

def private():  # pages of the mapped columns are the system's cache, shared and given up when memory is short
    rows = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(rows["Private_Dirty"].split()[0]) / 1024

before, begin = private(), time.perf_counter()
index = Index.open(sys.argv[1])
first = SampleStream(len(index), 0).take(0, 1)
seconds = time.perf_counter() - begin
stream = SampleStream(len(index), 0)
for sample, _ in stream.take(0, 2000):
    index.size(sample), index.boxes(sample).boxes.sum()
print(seconds, private() - before)
"""


@dataclass(frozen=True)
class LoaderCosts:
    """Ratios are how many times cheaper ours is. padding: padded over real pixels less 1, by order and microbatch."""

    images: int
    raw_microseconds: float  # with the checksum of every image
    unchecked_microseconds: float
    webdataset_microseconds: float
    raw_ratio: float
    unchecked_ratio: float
    fast_milliseconds: float
    official_milliseconds: float
    fast_ratio: float
    padding: dict[str, dict[int, float]]
    large_samples: int
    start_seconds: float
    worker_megabytes: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def measure_loader(folder: Path, images: int, tell: Callable[[str], None]) -> LoaderCosts:
    """All figures for a packed dataset; the first `images` samples are decoded. tell: told what is being measured."""
    index = Index.open(folder)
    count = min(images, len(index))
    tell("reading bytes: index + pread against plain webdataset")
    raw, unchecked, plain = _interleaved(
        [lambda: _raw(index, True), lambda: _raw(index, False), lambda: _webdataset(index)]
    )
    tell(f"decoding and augmenting {count} images: fast against the official chain")
    fast, official = _interleaved([lambda: _fast(index, count), lambda: _official(index, count)])
    tell("padding of the orders")
    orders: tuple[StreamMode, ...] = ("permutation", "size_planned")
    padding: dict[str, dict[int, float]] = {
        order: {size: _padding(index, order, size) for size in (2, 4, 8)} for order in orders
    }
    tell(f"a worker on an index of {LARGE} samples")
    seconds, megabytes = _large_index()
    return LoaderCosts(
        images=count,
        raw_microseconds=raw * 1e6,
        unchecked_microseconds=unchecked * 1e6,
        webdataset_microseconds=plain * 1e6,
        raw_ratio=plain / raw,
        unchecked_ratio=plain / unchecked,
        fast_milliseconds=fast / count * 1e3,
        official_milliseconds=official / count * 1e3,
        fast_ratio=official / fast,
        padding=padding,
        large_samples=LARGE,
        start_seconds=seconds,
        worker_megabytes=megabytes,
    )


def _interleaved(measures: list[Callable[[], float]]) -> list[float]:
    """The least CPU seconds of each, the measures taking turns."""
    rounds = [[measure() for measure in measures] for _ in range(REPEATS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _passes(index: Index) -> int:
    """Epochs to read, so that a small dataset is not measured by what happens once."""
    return -(-READS // len(index))


def _raw(index: Index, checked: bool) -> float:
    """Every image's bytes in the order of an epoch, and its boxes; seconds per sample."""
    begin = time.process_time()
    reader = Reader(index)
    read = reader.image_bytes if checked else reader.unchecked_bytes
    reads = _passes(index) * len(index)
    for sample, _ in SampleStream(len(index), 0).take(0, reads):
        read(sample)
        index.boxes(sample)
    return (time.process_time() - begin) / reads


def _webdataset(index: Index) -> float:
    """The same shards streamed, nothing checked or decoded; seconds per sample."""
    shards = [str(index.folder / name) for name in index.shard_names] * _passes(index)
    environment = {key: value for key, value in os.environ.items() if key != "WDS_SECURE"}
    command = [sys.executable, "-c", _STREAM, *shards]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert int(output[1]) == len(index) * _passes(index), "webdataset must see every sample"
    return float(output[0]) / int(output[1])


def _fast(index: Index, count: int) -> float:
    """As the loader does it: libjpeg-turbo, uint8, padded to microbatches of 4."""
    begin = time.process_time()
    reader = Reader(index)
    for start in range(0, count, 4):
        collate([_sample(index, reader, sample) for sample in range(start, min(start + 4, count))])
    return time.process_time() - begin


def _sample(index: Index, reader: Reader, sample: int) -> Sample:
    plan = _plan(index, sample)
    boxes = np.zeros((0, 4))
    image = apply_to_image(reader.image(sample), plan)
    return Sample(image, boxes, np.zeros(0, dtype=np.int32), index.size(sample), sample, 0)


def _official(index: Index, count: int) -> float:
    """The official chain: Pillow decodes and resizes, then float32, normalised and padded on the CPU."""
    begin = time.process_time()
    reader = Reader(index)
    for start in range(0, count, 4):
        images = []
        for sample in range(start, min(start + 4, count)):
            with Image.open(io.BytesIO(reader.image_bytes(sample))) as picture:
                pixels = np.array(picture.convert("RGB"))
            scaled = apply_to_image(pixels, _plan(index, sample), "reference").float().div_(255)
            images.append((scaled - _MEAN[:, None, None]) / _STD[:, None, None])
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = torch.zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
    return time.process_time() - begin


def _plan(index: Index, sample: int) -> Plan:
    height, width = index.size(sample)
    return sample_plan(width, height, AugmentationConfig(), Draws(0, 0, sample))


def _padding(index: Index, order: StreamMode, microbatch: int) -> float:
    """Of an epoch of SIZES images with the sizes of these."""

    def size_of(sample: int, epoch: int) -> tuple[int, int]:
        height, width = index.size(sample % len(index))
        return sample_plan(width, height, AugmentationConfig(), Draws(0, epoch, sample)).size

    stream: Stream = SampleStream(SIZES, 0)
    if order == "size_planned":
        stream = SizePlannedStream(SIZES, 0, microbatch, size_of)
    sizes = np.array([size_of(*pair) for pair in stream.take(0, SIZES)], dtype=np.int64).reshape(-1, microbatch, 2)
    return float((sizes.max(axis=1).prod(axis=1) * microbatch).sum() / sizes.prod(axis=2).sum() - 1)


def _large_index() -> tuple[float, float]:
    """(seconds to open and begin an epoch, private MB of a process), best of three, on an index of LARGE samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "large"
        write_large_index(folder, LARGE)
        found = []
        for _ in range(3):
            command = [sys.executable, "-c", _WORKER, str(folder)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            found.append((float(output[0]), float(output[1])))
    return min(found)


def write_large_index(folder: Path, samples: int) -> None:
    """An index that opens, of images and shards that are not there (files with holes, so almost no disk is used)."""
    (folder / "index").mkdir(parents=True)
    boxes = samples * BOXES_PER_IMAGE
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        **{name: (dtype, (samples,)) for name, dtype in SAMPLE_COLUMNS.items()},
        **{name: (dtype, (boxes,)) for name, dtype in BOX_COLUMNS.items()},
        "boxes": ("<f8", (boxes, 4)),
        "file_names": ("|S44", (samples,)),
        "box_offsets": ("<i8", (samples + 1,)),
    }
    for name, (dtype, shape) in shapes.items():
        column = np.lib.format.open_memmap(folder / f"index/{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)
        if name in ("image_ids", "box_offsets"):
            column[:] = np.arange(shape[0]) * (BOXES_PER_IMAGE if name == "box_offsets" else 1)
        if name in ("widths", "heights"):
            column[:] = 640
        column.flush()
    (folder / "shard-00000.tar").touch()
    files = [f"index/{name}.npy" for name in sorted(shapes)]
    entries = tuple(FileEntry(name, (folder / name).stat().st_size, "0" * 64) for name in files)
    shard = FileEntry("shard-00000.tar", 0, "0" * 64)
    Manifest(samples, boxes, objects365_categories(), (shard,), entries, {"format": "objects365"}, ()).write(folder)
