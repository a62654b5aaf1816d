"""What the data path costs, as ratios measured in one run on the same files. CPU time of one process, best of several
interleaved repetitions: wall time would measure the neighbours on a shared machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.bench_memory import large_index, packing_memory
from data_pipeline.bench_official import official_batch
from data_pipeline.collate import collate
from data_pipeline.decode import encode_jpeg
from data_pipeline.index import Index, ground_truth
from data_pipeline.loader import StreamMode, TrainingPreparation
from data_pipeline.order import Draws, SampleStream, Stream, WindowedStream
from data_pipeline.pack import pack
from data_pipeline.reader import Reader
from data_pipeline.size_order import SizePlannedStream
from data_pipeline.transforms import Plan, Resize, apply_to_image, sample_plan
from dino_scale.config.schema import AugmentationConfig

REPEATS = 5
READS = 2000  # samples read as bytes, at least
SIZES = 8192  # images whose padding is planned: a small dataset counts several times
LARGE = 1_800_000  # samples of Objects365 with most of its validation set
PACKED_BOXES = 2_000_000
MICROBATCH = 4
_SHARD = 512  # images of a shard where padding is planned
_ORDERS: tuple[StreamMode, ...] = ("permutation", "windowed", "size_planned")

# Plain webdataset as a user would write it. In a process of its own: ours forbids it to open anything.
_STREAM = """
import sys, time, webdataset
begin = time.process_time()
count = sum(len(row[0]) > 0 for row in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).to_tuple("jpg", "json"))
print(time.process_time() - begin, count)
"""


@dataclass(frozen=True)
class Row:
    """One figure. ratio: how many times cheaper than `against`; None where there is nothing beside it."""

    what: str
    way: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""


def measure_loader(folder: Path, images: int, tell: Callable[[str], None]) -> Iterator[Row]:
    """All figures for a packed dataset, one after another; the first `images` samples are decoded.

    tell: told what is being measured.
    """
    index = Index.open(folder)
    count = min(images, len(index))
    tell("reading bytes: index + pread against plain webdataset")
    yield from _reading(index)
    tell(f"decoding and augmenting {count} images: ours against the official chain")
    yield from _whole_path(index, count, f"{count} images as they are")
    with tempfile.TemporaryDirectory() as name:
        tell(f"the same at 640x480: {count} images are drawn")
        drawn = draw_at(index, count, 640, 480, Path(name))
        yield from _whole_path(drawn, count, f"{count} images at 640x480")
    tell("padding of the orders")
    for order in _ORDERS:
        for size in (2, 4, 8):
            yield Row(f"padded pixels over real ones, microbatch {size}", order, 100 * padding(index, order, size), "%")
    tell(f"a worker on an index of {LARGE} samples")
    seconds, added, whole = large_index(LARGE)
    what = f"index of {LARGE} samples"
    yield Row(what, "to open it and begin an epoch", seconds, "s")
    yield Row(what, "memory that this adds to a process", added, "MB")
    yield Row(what, "PSS of that process, libraries included", whole, "MB")
    tell(f"packing {PACKED_BOXES} boxes")
    yield Row(
        f"pack, {PACKED_BOXES} boxes", "peak memory of the process", packing_memory(PACKED_BOXES), "bytes per box"
    )


def _interleaved(measures: list[Callable[[], float]]) -> list[float]:
    """The least CPU seconds of each, the measures taking turns."""
    rounds = [[measure() for measure in measures] for _ in range(REPEATS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _reading(index: Index) -> Iterator[Row]:
    raw, unchecked, plain = _interleaved(
        [lambda: _raw(index, True), lambda: _raw(index, False), lambda: _webdataset(index)]
    )
    what, usual = "bytes and boxes of a sample", "plain webdataset, streamed"
    yield Row(what, "index + pread, checksum verified", raw * 1e6, "us", plain / raw, usual)
    yield Row(what, "index + pread, checksum not verified", unchecked * 1e6, "us", plain / unchecked, usual)
    yield Row(what, usual, plain * 1e6, "us", 1.0, usual)


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


def _whole_path(index: Index, count: int, images: str) -> Iterator[Row]:
    fast, official = _interleaved([lambda: _ours(index, count), lambda: _official(index, count)])
    what, usual = f"decode, augment, targets, collate: {images}", "official chain, Pillow, float32"
    yield Row(what, "ours, uint8", fast / count * 1e3, "ms", official / fast, usual)
    yield Row(what, usual, official / count * 1e3, "ms", 1.0, usual)


def _ours(index: Index, count: int) -> float:
    """As the loader does it: libjpeg-turbo, uint8, targets and all; CPU seconds."""
    begin = time.process_time()
    reader, preparation = Reader(index), TrainingPreparation(0, AugmentationConfig())
    for start in range(0, count, MICROBATCH):
        samples = range(start, min(start + MICROBATCH, count))
        collate([preparation.sample(reader, sample, 0) for sample in samples])
    return time.process_time() - begin


def _official(index: Index, count: int) -> float:
    begin = time.process_time()
    reader = Reader(index)
    for start in range(0, count, MICROBATCH):
        samples = range(start, min(start + MICROBATCH, count))
        official_batch(reader, samples, [plan_of(index, sample) for sample in samples])
    return time.process_time() - begin


def plan_of(index: Index, sample: int) -> Plan:
    height, width = index.size(sample)
    return sample_plan(width, height, AugmentationConfig(), Draws(0, 0, sample))


def draw_at(index: Index, count: int, width: int, height: int, folder: Path) -> Index:
    """The first samples with their boxes, drawn anew at one size and packed: what they show is what decoding costs."""
    (folder / "images").mkdir()
    reader, truth = Reader(index), ground_truth(index)
    scale = {}
    for sample in range(count):
        pixels = apply_to_image(
            reader.image(sample), Plan(False, (Resize(height, width),), (height, width)), "reference"
        )
        jpeg = encode_jpeg(pixels.permute(1, 2, 0).numpy())
        (folder / f"images/{index.image_id(sample)}.jpg").write_bytes(jpeg)
        high, wide = index.size(sample)
        scale[index.image_id(sample)] = np.array([width / wide, height / high] * 2)
    rows = [row for row in truth["annotations"] if row["image_id"] in scale]
    content = {
        "categories": truth["categories"],
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": width, "height": height} for number in scale],
        "annotations": [{**row, "bbox": (np.array(row["bbox"]) * scale[row["image_id"]]).tolist()} for row in rows],
    }
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    pack(folder / "instances.json", [folder / "images"], folder / "shards")
    return Index.open(folder / "shards")


def padding(index: Index, order: StreamMode, microbatch: int) -> float:
    """Padded pixels over real ones, less 1, of an epoch of SIZES images with the sizes of these."""

    def size_of(sample: int, epoch: int) -> tuple[int, int]:
        height, width = index.size(sample % len(index))
        return sample_plan(width, height, AugmentationConfig(), Draws(0, epoch, sample)).size

    stream: Stream = SampleStream(SIZES, 0)
    if order == "size_planned":
        stream = SizePlannedStream(SIZES, 0, microbatch, size_of)
    elif order == "windowed":
        stream = WindowedStream(SIZES, 0, lambda: np.arange(SIZES) // _SHARD)
    sizes = np.array([size_of(*pair) for pair in stream.take(0, SIZES)], dtype=np.int64).reshape(-1, microbatch, 2)
    return float((sizes.max(axis=1).prod(axis=1) * microbatch).sum() / sizes.prod(axis=2).sum() - 1)
