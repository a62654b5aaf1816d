"""What a step trains on does not depend on how many workers share it, nor on where a run was stopped."""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.collate import Sample, collate
from data_pipeline.index import Index
from data_pipeline.loader import (
    StreamMode,
    _tells_of_a_dead_process,
    deal,
    evaluation_batches,
    training_microbatches,
)
from data_pipeline.order import SampleStream, epoch_order
from data_pipeline.reader import read_image
from data_pipeline.transforms import resize_for_evaluation
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import ConfigError, WorkerLostError
from dino_scale.structures import Batch

AUGMENTATION = AugmentationConfig(
    scales=(64, 80, 96), max_size=128, crop_resize=(72, 88), crop_min=48, crop_max=72
)  # fmt: skip
SEED = 11


def steps_of_rank(
    index: Index,
    batch: BatchConfig,
    rank: int,
    world: int,
    first: int,
    last: int,
    workers: int = 0,
    order: StreamMode = "permutation",
):
    return training_microbatches(
        index,
        seed=SEED,
        augmentation=AUGMENTATION,
        batch=batch,
        rank=rank,
        world=world,
        first_step=first,
        last_step=last,
        loader_workers=workers,
        order=order,
    )


def fingerprints(batch: Batch) -> list[tuple[int, str]]:
    """(sample id, digest of its pixels, labels and boxes) of every image, independent of the padding."""
    found = []
    for row, (labels, boxes) in enumerate(batch.targets.per_image()):
        height, width = batch.sizes[row]
        digest = hashlib.sha256()
        for part in (batch.images[row, :, :height, :width].contiguous(), labels.contiguous(), boxes.contiguous()):
            digest.update(part.numpy().tobytes())
        found.append((batch.sample_ids[row], digest.hexdigest()))
    return found


def run(
    index: Index,
    batch: BatchConfig,
    world: int,
    first: int,
    last: int,
    workers: int = 0,
    order: StreamMode = "permutation",
) -> list[list]:
    """Fingerprints of every global step, ranks put together in order."""
    ranks = [steps_of_rank(index, batch, rank, world, first, last, workers, order) for rank in range(world)]
    return [
        [print_ for rank in ranks for microbatch in next(rank) for print_ in fingerprints(microbatch)]
        for _ in range(first, last)
    ]


STEPS = 10  # of 16: more than two epochs of 61 samples
Reference = Callable[[StreamMode, int], list[list]]


@pytest.fixture(scope="module")
def reference_of(packed_scenes: Path) -> Reference:
    """The steps on one worker without loader processes; of the microbatch where the order depends on it."""

    @cache
    def steps(order: StreamMode, microbatch: int) -> list[list]:
        return run(Index.open(packed_scenes), BatchConfig(16, microbatch), 1, 0, STEPS, order=order)

    return lambda order, microbatch: steps(order, microbatch if order == "size_planned" else 4)


@pytest.fixture(scope="module")
def reference(reference_of: Reference) -> list[list]:
    return reference_of("permutation", 4)


@dataclass(frozen=True)
class Sharing:
    """How many ranks share a step of 16, in microbatches of how many, each with how many loader processes."""

    world: int
    microbatch: int
    loader_workers: int


def sharings(microbatch: int | None = None) -> st.SearchStrategy[Sharing]:
    """Every one of them; loader processes only where they are not more than eight together."""
    found = [
        Sharing(world, size, workers)
        for world in (1, 2, 4, 8, 16)
        for size in (1, 2, 4, 8, 16)
        for workers in (0, 1, 2)
        if 16 % (world * size) == 0 and world * workers <= 8 and size == (microbatch or size)
    ]
    return st.sampled_from(found)


@st.composite
def plays(draw: st.DrawFn) -> tuple[StreamMode, Sharing, Sharing, int]:
    """An order, the sharing before and after a stop, and the step at which it stops."""
    order: StreamMode = draw(st.sampled_from(["permutation", "windowed", "size_planned"]))
    before = draw(sharings())
    after = draw(sharings(before.microbatch if order == "size_planned" else None))
    return order, before, after, draw(st.integers(0, STEPS))


def check_play(packed: Path, reference_of: Reference, play: tuple[StreamMode, Sharing, Sharing, int]) -> None:
    order, before, after, stop = play
    index = Index.open(packed)
    parts = [(before, 0, stop), (after, stop, STEPS)]
    steps = [
        run(index, BatchConfig(16, part.microbatch), part.world, first, last, part.loader_workers, order)
        for part, first, last in parts
    ]
    assert steps[0] + steps[1] == reference_of(order, before.microbatch)


@settings(max_examples=6, deadline=None)
@given(play=plays())
@example(play=("windowed", Sharing(2, 4, 2), Sharing(1, 16, 1), 3))
@example(play=("size_planned", Sharing(4, 2, 1), Sharing(2, 2, 2), 7))
def test_any_topology_and_any_stop_give_the_same_steps(packed_scenes, reference_of, play) -> None:
    check_play(packed_scenes, reference_of, play)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(play=plays())
def test_very_many_topologies_and_stops_give_the_same_steps(packed_scenes, reference_of, play) -> None:
    check_play(packed_scenes, reference_of, play)


def test_every_sample_once_per_epoch_with_fresh_augmentation(reference: list[list]) -> None:
    stream = [pair for step in reference for pair in step]
    for epoch in range(2):
        ids = [sample for sample, _ in stream[61 * epoch : 61 * (epoch + 1)]]
        assert sorted(ids) == list(range(61)) and ids == epoch_order(61, SEED, epoch).tolist()
    first, second = dict(stream[:61]), dict(stream[61:122])
    assert sum(first[sample] == second[sample] for sample in range(61)) < 6


@pytest.mark.parametrize("order", ["windowed", "size_planned"])
def test_other_orders_show_every_sample_once_per_epoch_too(reference_of: Reference, order: StreamMode) -> None:
    ids = [sample for step in reference_of(order, 2) for sample, _ in step]
    assert sorted(ids[:61]) == sorted(ids[61:122]) == list(range(61)) != ids[:61]
    assert ids[:61] != ids[61:122]


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 300),
    world=st.integers(1, 6),
    microbatch=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    step=st.integers(0, 40),
)
def test_dealing_follows_the_contract(n: int, world: int, microbatch: int, accumulation: int, step: int) -> None:
    size = world * microbatch * accumulation
    stream = SampleStream(n, 3)
    slices = [stream.take(step * size + j, step * size + j + microbatch) for j in range(0, size, microbatch)]
    for rank in range(world):
        mine = deal(stream, BatchConfig(size, microbatch), rank, world, step)
        assert mine == slices[rank * accumulation : (rank + 1) * accumulation]


def test_a_global_batch_that_does_not_divide(scenes: Index) -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_size is 16: expected a multiple of .* 2 x 3 = 6"):
        next(steps_of_rank(scenes, BatchConfig(16, 2), 0, 3, 0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_random_state_of_training_alone(scenes: Index, workers: int) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.random(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert len(list(steps_of_rank(scenes, BatchConfig(16, 4), 0, 2, 0, 2, workers))) == 2
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.random(3), expected[1])


def test_batches_are_what_the_contract_says(scenes: Index) -> None:
    [microbatches] = list(steps_of_rank(scenes, BatchConfig(61, 61), 0, 1, 0, 1))
    [batch] = microbatches
    assert batch.images.dtype == torch.uint8 and batch.images.shape[:2] == (61, 3)
    assert batch.images.shape[2] == max(h for h, _ in batch.sizes)
    assert batch.images.shape[3] == max(w for _, w in batch.sizes)
    assert batch.images.masked_select(batch.padding_mask()[:, None]).sum() == 0
    assert batch.targets.labels.dtype == torch.int64 and batch.targets.boxes.dtype == torch.float32
    assert sum(batch.targets.counts) == len(batch.targets.labels) == len(batch.targets.boxes)
    assert 0 in batch.targets.counts, "images without boxes are kept"
    low = batch.targets.boxes[:, :2] - batch.targets.boxes[:, 2:] / 2
    high = batch.targets.boxes[:, :2] + batch.targets.boxes[:, 2:] / 2
    assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6
    for row, sample in enumerate(batch.sample_ids):
        assert batch.image_ids[row] == scenes.image_id(sample)
        assert batch.original_sizes[row] == scenes.size(sample)
        truth = scenes.boxes(sample)
        assert batch.targets.counts[row] <= (~truth.crowd).sum(), "crowd boxes are no targets"


def test_a_crowd_box_is_no_target_but_stays_in_the_index(scenes: Index) -> None:
    plain = AugmentationConfig(scales=(96,), max_size=200, flip=0, crop=0)
    [[batch]] = list(
        training_microbatches(
            scenes, seed=0, augmentation=plain, batch=BatchConfig(61, 61), rank=0, world=1,
            first_step=0, last_step=1, loader_workers=0,
        )
    )  # fmt: skip
    crowds = 0
    for row, (labels, boxes) in enumerate(batch.targets.per_image()):
        truth = scenes.boxes(batch.sample_ids[row])
        assert labels.tolist() == truth.labels[~truth.crowd].tolist()
        height, width = batch.original_sizes[row]
        corner = (boxes[:, :2] - boxes[:, 2:] / 2) * torch.tensor([width, height])
        np.testing.assert_allclose(corner, truth.boxes[~truth.crowd][:, :2], atol=1e-4)
        crowds += int(truth.crowd.sum())
    assert crowds > 0


def test_padded_sizes_are_rounded_up_on_request() -> None:
    def sample(height: int, width: int) -> Sample:
        image = torch.full((3, height, width), 9, dtype=torch.uint8)
        return Sample(image, np.array([[0.0, 0.0, width, height]]), np.zeros(1, dtype=np.int32), (1, 2), 0, 0)

    plain, rounded = (collate([sample(33, 64), sample(20, 70)], multiple) for multiple in (1, 32))
    assert plain.images.shape[2:] == (33, 70) and rounded.images.shape[2:] == (64, 96)
    assert torch.equal(rounded.images[:, :, :33, :70], plain.images) and rounded.sizes == plain.sizes
    assert int(rounded.images.sum()) == int(plain.images.sum())
    assert torch.equal(rounded.targets.boxes, plain.targets.boxes)


@pytest.mark.parametrize(("world", "microbatch", "workers"), [(1, 1, 0), (3, 4, 0), (2, 5, 2), (70, 2, 0)])
def test_evaluation_shows_every_image_once(scenes: Index, world: int, microbatch: int, workers: int) -> None:
    seen = []
    for rank in range(world):
        for batch in evaluation_batches(
            scenes, short_side=80, max_size=120, microbatch=microbatch, rank=rank, world=world, loader_workers=workers
        ):
            assert len(batch.sizes) <= microbatch
            assert all(sample % world == rank for sample in batch.sample_ids)
            seen += batch.image_ids
    assert sorted(seen) == sorted(scenes.columns["image_ids"].tolist())


def test_evaluation_images_are_resized_and_nothing_else(scenes: Index) -> None:
    batches = evaluation_batches(scenes, short_side=80, max_size=120, microbatch=1, rank=0, world=20)
    for batch in batches:
        [image_id] = batch.image_ids
        assert torch.equal(batch.images[0], resize_for_evaluation(read_image(scenes, image_id), 80, 120))


def test_collate_pads_right_and_below() -> None:
    def sample(height: int, width: int, boxes: int) -> Sample:
        image = torch.full((3, height, width), 9, dtype=torch.uint8)
        corners = np.tile([0.0, 0.0, width / 2, height], (boxes, 1))
        return Sample(image, corners, np.zeros(boxes, dtype=np.int32), (1, 2), 0, 0)

    batch = collate([sample(4, 6, 0), sample(5, 3, 2)])
    assert batch.images.shape == (2, 3, 5, 6)
    assert int((batch.images == 9).sum()) == 3 * (24 + 15) and int((batch.images == 0).sum()) == 3 * (6 + 15)
    assert batch.targets.counts == (0, 2)
    assert batch.targets.boxes.tolist() == [[0.25, 0.5, 0.5, 1.0]] * 2


def test_a_killed_loader_process_is_reported(scenes: Index) -> None:
    import multiprocessing

    before = {process.pid for process in multiprocessing.active_children()}
    steps = steps_of_rank(scenes, BatchConfig(16, 4), 0, 1, 0, 1000, 2)
    next(steps)
    workers = [process for process in multiprocessing.active_children() if process.pid not in before]
    assert len(workers) == 2 and workers[0].pid
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="a loader process died"):
        for _ in steps:
            pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(scenes: Index, workers: int) -> None:
    def batches(loader_workers: int, pin: bool) -> list[Batch]:
        steps = training_microbatches(
            scenes, seed=1, augmentation=AUGMENTATION, batch=BatchConfig(4, 2), rank=0, world=1, first_step=0,
            last_step=4, loader_workers=loader_workers, pin=pin,
        )  # fmt: skip
        return [batch for step in steps for batch in step]

    for plain, pinned in zip(batches(0, False), batches(workers, True), strict=True):
        assert pinned.images.is_pinned() and pinned.targets.boxes.is_pinned() and pinned.targets.labels.is_pinned()
        assert plain.sample_ids == pinned.sample_ids and torch.equal(plain.images, pinned.images)
        assert torch.equal(plain.targets.boxes, pinned.targets.boxes)


@pytest.mark.parametrize(
    ("error", "dead"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (FileNotFoundError("Caught FileNotFoundError in pin memory thread for device 0.\nOriginal ..."), True),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 1.\nOriginal ..."), False),
        (RuntimeError("Caught RuntimeError in pin memory thread for device 0.\nOriginal ..."), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_tell_of_a_dead_process(error: Exception, dead: bool) -> None:
    assert _tells_of_a_dead_process(error) is dead
