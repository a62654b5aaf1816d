"""Which images a run has to train on, from the definition of the order alone, and which it did train on."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.index import Index
from data_pipeline.order import SampleStream
from dino_scale.training.sample_log import read_samples


def expected_images(shards: Path, seed: int, global_size: int, steps: int) -> list[list[int]]:
    """The image ids of steps 1 ... `steps`, each in the order of the global batch."""
    index = Index.open(shards)
    stream = SampleStream(len(index), seed).take(0, steps * global_size)
    ids = [index.image_id(sample) for sample, _ in stream]
    return [ids[start : start + global_size] for start in range(0, len(ids), global_size)]


def assert_each_image_once_per_epoch(stage: Path, shards: Path, seed: int, global_size: int, steps: int) -> None:
    """The record of a stage (folder R/STAGE, `data.log_samples: true`) is that of a run that nothing happened to."""
    found = read_samples(stage / "samples")
    assert found == expected_images(shards, seed, global_size, steps)
    index = Index.open(shards)
    everyone = sorted(index.image_id(sample) for sample in range(len(index)))
    seen = [image for step in found for image in step]
    whole_epochs = len(seen) // len(everyone)
    assert whole_epochs > 0
    for epoch in range(whole_epochs):
        assert sorted(seen[epoch * len(everyone) : (epoch + 1) * len(everyone)]) == everyone
