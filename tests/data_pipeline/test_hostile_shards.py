"""Shards that were made by somebody else, whose manifest and checksums agree with what they hold."""

from __future__ import annotations

import shutil
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.checksum import crc32
from data_pipeline.index import Index
from data_pipeline.loader import training_microbatches
from data_pipeline.manifest import describe_file, read_manifest
from data_pipeline.replacement import BadSample
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import DataError

AUGMENTATION = AugmentationConfig(scales=(64, 80), max_size=128, crop_resize=(72,), crop_min=48, crop_max=72)
SAMPLE = 20


@pytest.fixture
def copy(packed_scenes: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed_scenes, tmp_path / "copy")
    return tmp_path / "copy"


def agree(folder: Path) -> Index:
    """The folder with a manifest that was made to fit what is in it now."""
    manifest = read_manifest(folder)
    shards, columns = (
        tuple(describe_file(folder, entry.name) for entry in entries) for entries in (manifest.shards, manifest.columns)
    )
    replace(manifest, shards=shards, columns=columns).write(folder)
    return Index.open(folder)


def claim(folder: Path, width: int, height: int) -> None:
    """The header of one image claims another size; its checksum in the index is that of the changed bytes."""
    index = Index.open(folder)
    path = folder / index.shard_names[int(index.columns["shards"][SAMPLE])]
    start, size = (int(index.columns[name][SAMPLE]) for name in ("image_offsets", "image_sizes"))
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xc0", start) + 5
    data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    path.write_bytes(data)
    checksums = np.array(index.columns["image_checksums"])
    checksums[SAMPLE] = crc32(bytes(data[start : start + size]))
    np.save(folder / "index/image_checksums.npy", checksums)


def epoch(index: Index, bad: list[BadSample]) -> list[tuple[tuple[int, ...], bytes]]:
    steps = training_microbatches(
        index, seed=4, augmentation=AUGMENTATION, batch=BatchConfig(16, 4), rank=0, world=1, first_step=0, last_step=4,
        loader_workers=0, on_bad=bad.append,
    )  # fmt: skip
    return [(batch.sample_ids, batch.images.numpy().tobytes()) for step in steps for batch in step]


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [(65_520, 65_520, "claims too many pixels; expected at most"), (9_000, 9_000, "9000 pixels, not as indexed")],
)
def test_training_replaces_a_bomb_and_does_not_decode_it(copy: Path, width: int, height: int, reason: str) -> None:
    claim(copy, width, height)
    index, bad = agree(copy), list[BadSample]()
    tracemalloc.start()
    try:
        shown = [sample for ids, _ in epoch(index, bad) for sample in ids]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {sample.sample_id for sample in bad} == {SAMPLE} and reason in bad[0].reason
    assert len(shown) == 64 and SAMPLE not in shown
    assert most < 60e6, "of the two, decoded, one would take 13 GB and the other 240 MB"


def test_as_bytes_it_would_have_been_too_many(copy: Path) -> None:
    """That the limit above can be broken: numpy's pixels are traced."""
    tracemalloc.start()
    try:
        assert np.ones((9_000, 9_000), dtype=np.uint8).any() and tracemalloc.get_traced_memory()[1] > 60e6
    finally:
        tracemalloc.stop()


def test_training_never_looks_at_a_member_that_is_not_in_the_index(copy: Path, scenes: Index) -> None:
    name = scenes.key(SAMPLE)
    with tarfile.open(copy / "shard-00001.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for target in (f"{name}.jpg", "../../escape.jpg"):
                link = tarfile.TarInfo(target)
                link.type, link.linkname = kind, "/etc/passwd"
                tar.addfile(link)
    bad: list[BadSample] = []
    assert epoch(agree(copy), bad) == epoch(scenes, bad) and not bad
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy"]
    assert not [path for path in copy.rglob("*") if path.is_symlink()]


def test_an_index_with_too_many_boxes_of_an_image_is_refused(copy: Path) -> None:
    boxes = len(np.load(copy / "index/labels.npy"))
    for path in (copy / "index").glob("*.npy"):
        column = np.load(path)
        if len(column) == boxes:
            np.save(path, np.concatenate([column, *[column[:1]] * 10_001]))
    offsets = np.load(copy / "index/box_offsets.npy")
    offsets[-1] += 10_001
    np.save(copy / "index/box_offsets.npy", offsets)
    replace(read_manifest(copy), boxes=boxes + 10_001).write(copy)
    with pytest.raises(DataError, match=r"box_offsets\.npy: has more than 10000 boxes of one image"):
        agree(copy)
