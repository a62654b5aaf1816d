"""What 8 to 512 workers would do, worked out in one process: who trains on what, who reads what, who saves what."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.loader import deal, microbatches_per_rank
from data_pipeline.order import SampleStream, Stream, WindowedStream
from data_pipeline.size_order import SizePlannedStream
from dino_scale.config.schema import BatchConfig, OptimizerConfig
from launch.plan_cost import reading
from launch.plan_memory import memory, model_size
from tests.support.memory_of_engines import MODEL
from tests.support.partitions import parameter_sizes, pieces
from tests.support.tiny_detector import CLASSES

WORLDS = (8, 16, 64, 128, 256, 512)
BATCH = BatchConfig(global_size=1024, microbatch=2)
SAMPLES, PER_SHARD = 10_000, 100


def stream_of(order: str) -> Stream:
    if order == "windowed":
        return WindowedStream(SAMPLES, 3, lambda: np.arange(SAMPLES) // PER_SHARD)
    if order == "size_planned":
        return SizePlannedStream(SAMPLES, 3, BATCH.microbatch, lambda sample, epoch: (60 + sample % 41, 100))
    return SampleStream(SAMPLES, seed=3)


def epoch_of(world: int, stream: Stream) -> list[list[list[tuple[int, int]]]]:
    """Per step of the first epoch (its last batch reaches into the second), the microbatches in rank order."""
    steps = -(-SAMPLES // BATCH.global_size)
    return [
        [microbatch for rank in range(world) for microbatch in deal(stream, BATCH, rank, world, step)]
        for step in range(steps)
    ]


@pytest.mark.parametrize("order", ["permutation", "windowed", "size_planned"])
def test_every_world_size_takes_the_same_steps(order: str) -> None:
    """The same microbatches in the same places of the global batch, each sample of the epoch once."""
    stream = stream_of(order)
    first = epoch_of(WORLDS[0], stream)
    seen = Counter(sample for step in first for microbatch in step for sample, epoch in microbatch if epoch == 0)
    assert seen == Counter(range(SAMPLES))
    assert all(sum(map(len, step)) == BATCH.global_size for step in first)
    for world in WORLDS[1:]:
        assert epoch_of(world, stream) == first


@pytest.mark.parametrize("world", WORLDS)
def test_reads_of_every_node(world: int) -> None:
    """The formula of the plan against the order itself, eight workers to a node."""
    nodes = world // 8
    stream, share = SampleStream(SAMPLES, seed=3), BATCH.global_size // world
    images, shards = np.zeros(nodes, np.int64), [set[int]() for _ in range(nodes)]
    for position in range(SAMPLES):
        node = position % BATCH.global_size // share // 8
        sample, _ = stream.take(position, position + 1)[0]
        images[node] += 1
        shards[node].add(sample // PER_SHARD)
    planned = reading(SAMPLES, SAMPLES * 1000, SAMPLES // PER_SHARD, nodes)
    assert abs(images - planned.images).max() <= BATCH.global_size // nodes  # the last batch of the epoch is cut
    touched = np.mean([len(one) for one in shards])
    assert abs(touched - planned.shards) < 0.05 * planned.shards


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoint_pieces_cover_everything_once(world: int, stage: int) -> None:
    """Every rank's pieces as DeepSpeed would cut them, laid side by side."""
    size = model_size(MODEL, CLASSES, OptimizerConfig())
    written = Counter[int]()
    held = [0] * world
    for rank in range(world):
        for parameter, start, numel in pieces(size, stage, rank, world):
            assert numel > 0
            assert start + numel <= parameter_sizes(size)[parameter]
            written[parameter] += numel
            held[rank] += numel
    assert [written[number] for number in range(len(parameter_sizes(size)))] == parameter_sizes(size)
    planned = memory(size, stage, world, average=True)
    if stage > 0:
        assert max(held) * 4 <= planned.average  # what a rank writes fits into the share that the plan gives it
        assert planned.average <= 4 * (size.trained // world + 2 * len(size.groups) + len(parameter_sizes(size)))


@pytest.mark.parametrize("world", WORLDS)
def test_pieces_do_not_overlap(world: int) -> None:
    size = model_size(MODEL, CLASSES, OptimizerConfig())
    for stage in (0, 1, 3):
        spans = sorted(
            (parameter, start, start + numel)
            for rank in range(world)
            for parameter, start, numel in pieces(size, stage, rank, world)
        )
        for (parameter, _, stop), (following, start, _) in pairwise(spans):
            assert following > parameter or start == stop


def test_a_world_that_does_not_divide_is_not_simulated_but_refused() -> None:
    assert [microbatches_per_rank(BATCH, world) for world in WORLDS] == [64, 32, 8, 4, 2, 1]
