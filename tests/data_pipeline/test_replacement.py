"""Shards are damaged for real; what takes the place of a lost sample depends on order and damage alone."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.index import Index
from data_pipeline.loader import evaluation_batches, training_microbatches
from data_pipeline.order import SampleStream
from data_pipeline.replacement import BadSample
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import DataError

AUGMENTATION = AugmentationConfig(scales=(64, 80), max_size=128, crop_resize=(72,), crop_min=48, crop_max=72)
SEED, SAMPLES = 11, 61


def flip_a_bit(index: Index) -> None:
    """One byte of one image."""
    sample = SampleStream(SAMPLES, SEED).take(20, 21)[0][0]
    path = index.folder / index.shard_names[int(index.columns["shards"][sample])]
    data = bytearray(path.read_bytes())
    data[int(index.columns["image_offsets"][sample]) + 500] ^= 0xFF
    path.write_bytes(data)


def cut(index: Index) -> None:
    """The second half of a shard is gone."""
    path = index.folder / index.shard_names[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def vanish(index: Index) -> None:
    (index.folder / index.shard_names[1]).unlink()


DAMAGE: dict[str, Callable[[Index], None]] = {"bit": flip_a_bit, "cut": cut, "vanished": vanish}
REASON = {"bit": "does not match its checksum", "cut": "ends after", "vanished": "No such file"}


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, packed_scenes: Path, tmp_path: Path) -> tuple[Index, str]:
    shutil.copytree(packed_scenes, tmp_path / "copy")
    index = Index.open(tmp_path / "copy")  # opened while all was well
    DAMAGE[request.param](index)
    return index, request.param


def run(
    index: Index, microbatch: int, world: int, first: int, last: int, workers: int = 0
) -> tuple[list[list[tuple[int, str]]], list[BadSample]]:
    """(sample id, digest of the pixels) of every image of every global step, and what was told of bad samples."""
    bad: list[BadSample] = []
    ranks = [
        training_microbatches(
            index, seed=SEED, augmentation=AUGMENTATION, batch=BatchConfig(16, microbatch), rank=rank, world=world,
            first_step=first, last_step=last, loader_workers=workers, on_bad=bad.append,
        )
        for rank in range(world)
    ]  # fmt: skip
    steps, replaced = [], 0
    for _ in range(first, last):
        step = []
        for batch in (batch for rank in ranks for batch in next(rank)):
            replaced += batch.replaced
            for row, (height, width) in enumerate(batch.sizes):
                pixels = batch.images[row, :, :height, :width].contiguous().numpy().tobytes()
                step.append((batch.sample_ids[row], hashlib.sha256(pixels).hexdigest()))
        steps.append(step)
    assert replaced == len(bad)
    return steps, sorted(bad, key=lambda sample: sample.position)


def test_the_replacement_is_the_next_readable_sample_of_the_order(damaged: tuple[Index, str]) -> None:
    index, kind = damaged
    steps, bad = run(index, 4, 1, 0, 8)
    lost = {sample.sample_id for sample in bad}
    stream = SampleStream(SAMPLES, SEED).take(0, 8 * 16 + SAMPLES)
    assert lost and all(REASON[kind] in sample.reason and sample.shard in sample.reason for sample in bad)
    shown = [sample for step in steps for sample, _ in step]
    for position, sample in enumerate(shown):
        if stream[position][0] not in lost:
            assert sample == stream[position][0], "nothing else moves"
        else:
            assert sample == next(later for later, _ in stream[position:] if later not in lost)
    assert [sample.position for sample in bad] == [p for p in range(128) if stream[p][0] in lost]
    assert [sample.file_name for sample in bad] == [index.file_name(sample.sample_id) for sample in bad]


def test_any_topology_replaces_alike(damaged: tuple[Index, str]) -> None:
    index, _ = damaged
    steps, bad = run(index, 4, 1, 0, 8)
    for microbatch, world, workers in ((2, 4, 0), (1, 2, 0), (4, 1, 2)):
        assert run(index, microbatch, world, 0, 8, workers) == (steps, bad)
    before, after = run(index, 8, 1, 0, 3), run(index, 2, 2, 3, 8)
    assert (before[0] + after[0], before[1] + after[1]) == (steps, bad)


def test_nothing_readable_is_an_error(packed_scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(packed_scenes, tmp_path / "copy")
    index = Index.open(tmp_path / "copy")
    for name in index.shard_names:
        (index.folder / name).unlink()
    with pytest.raises(DataError, match="64 samples in a row cannot be read"):
        run(index, 4, 1, 0, 1)


def test_evaluation_replaces_nothing(damaged: tuple[Index, str]) -> None:
    index, kind = damaged
    with pytest.raises(DataError, match=REASON[kind]) as caught:
        list(evaluation_batches(index, short_side=64, max_size=96, microbatch=2, rank=0, world=1))
    assert "\n" not in str(caught.value)
