"""What the data path costs in memory, measured in processes of their own: a fork or its parent's peak tell nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from data_pipeline.categories import objects365_categories
from data_pipeline.decode import encode_jpeg
from data_pipeline.index import BOX_COLUMNS, SAMPLE_COLUMNS
from data_pipeline.manifest import FileEntry, Manifest

BOXES_PER_IMAGE = 14  # of the large index, as in Objects365
PACKED_PER_IMAGE = 8000  # many, so that few images have to be written
_SIDE = 64  # pixels of those

# What one loader process holds: opens the index, begins an epoch, looks at some samples.
_WORKER = """
import sys, time
from data_pipeline.index import Index
from data_pipeline.order import SampleStream

def megabytes(name):  # private: the mapped columns' pages are the system's cache, shared, given up if memory is short
    rows = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(rows[name].split()[0]) / 1024

before, begin = megabytes("Private_Dirty"), time.perf_counter()
index = Index.open(sys.argv[1])
first = SampleStream(len(index), 0).take(0, 1)
seconds = time.perf_counter() - begin
stream = SampleStream(len(index), 0)
for sample, _ in stream.take(0, 2000):
    index.size(sample), index.boxes(sample).boxes.sum()
print(seconds, megabytes("Private_Dirty") - before, megabytes("Pss"))
"""
# What packing takes at its peak above what its imports take: of this address space alone, begun by exec.
_PACK = """
import sys
from pathlib import Path
from data_pipeline.pack import pack

def most():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = most()
report = pack(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), samples_per_shard=5)
print((most() - before) / report.boxes, report.boxes)
"""


def packing_memory(boxes: int) -> float:
    """Bytes per box that the whole of `pack` takes at its peak, in one process, for a file of so many boxes.

    A shard has as many boxes as one of 3,000 ordinary images.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_crowded(folder, boxes)
        found = _measure(_PACK, str(folder / "instances.json"), str(folder / "images"), str(folder / "shards"))
    assert int(found[1]) == boxes, "nothing may be left out"
    return found[0]


def write_crowded(folder: Path, boxes: int) -> None:
    """A COCO-format file of so many different boxes, on as few small images as are allowed to have them."""
    (folder / "images").mkdir(parents=True)
    images = range(-(-boxes // PACKED_PER_IMAGE))
    image = encode_jpeg(np.zeros((_SIDE, _SIDE, 3), dtype=np.uint8))
    for number in images:
        (folder / f"images/{number}.jpg").write_bytes(image)
    with open(folder / "instances.json", "w", encoding="utf-8") as file:
        file.write('{"categories": [{"id": 1, "name": "a"}], "images": [')
        row = f'{{{{"id": {{0}}, "file_name": "{{0}}.jpg", "width": {_SIDE}, "height": {_SIDE}}}}}'
        file.write(", ".join(row.format(number) for number in images))
        file.write('], "annotations": [')
        for number in range(boxes):
            box = f"[{number % 32}.5, {number // 32 % 32}.25, {1 + number // 1024 % 31}.125, 20]"
            place = f'"id": {number + 1}, "image_id": {number // PACKED_PER_IMAGE}, "category_id": 1'
            file.write(f'{"," if number else ""}\n{{{place}, "bbox": {box}, "area": 60.5, "iscrowd": 0}}')
        file.write("]}")


def large_index(samples: int) -> tuple[float, float, float]:
    """(seconds to open and begin an epoch, private MB added by that, PSS in MB of the whole process), best of three."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "large"
        write_large_index(folder, samples)
        found = min(_measure(_WORKER, str(folder)) for _ in range(3))
    return found[0], found[1], found[2]


def _measure(program: str, *arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


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
