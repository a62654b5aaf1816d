"""Microbatches for one worker of any number: who gets what is a pure function, and so is every pixel.

The sample stream is the epochs' orders one after another. Global batch k is stream[k * G : (k + 1) * G], microbatch j
of it its j-th slice, and rank r takes the A = G / (microbatch * world) microbatches from r * A on.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.collate import Sample, collate
from data_pipeline.index import Index
from data_pipeline.order import Draws, SampleStream
from data_pipeline.reader import Reader
from data_pipeline.transforms import apply_to_boxes, apply_to_image, resize_for_evaluation, sample_plan
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import ConfigError, DataError, WorkerLostError
from dino_scale.structures import Batch

Assignment = list[tuple[int, int]]  # (sample id, epoch) of every image of a microbatch
PREFETCH = 4  # microbatches that each loader process prepares ahead


def microbatches_per_rank(batch: BatchConfig, world: int) -> int:
    """Accumulation A. Raises ConfigError where the global batch does not divide."""
    if batch.global_size % (batch.microbatch * world):
        raise ConfigError(
            f"batch.global_size is {batch.global_size}: expected a multiple of batch.microbatch x workers = "
            f"{batch.microbatch} x {world} = {batch.microbatch * world}: change one of them"
        )
    return batch.global_size // (batch.microbatch * world)


def deal(stream: SampleStream, batch: BatchConfig, rank: int, world: int, step: int) -> list[Assignment]:
    """This rank's microbatches of a global step."""
    accumulation = microbatches_per_rank(batch, world)
    share = accumulation * batch.microbatch
    start = step * batch.global_size + rank * share
    mine = stream.take(start, start + share)
    return [mine[place : place + batch.microbatch] for place in range(0, share, batch.microbatch)]


def training_microbatches(
    index: Index,
    *,
    seed: int,
    augmentation: AugmentationConfig,
    batch: BatchConfig,
    rank: int,
    world: int,
    first_step: int,
    last_step: int,
    loader_workers: int,
) -> Iterator[list[Batch]]:
    """One item per global step first_step, ..., last_step - 1: this rank's microbatches, in order.

    Crowd boxes are left out; images without boxes are kept. Augmentation draws depend on (seed, epoch, sample id).
    loader_workers: processes that read ahead; 0: read in this process. Raises ConfigError where the global batch does
    not divide, DataError (shard, member, reason) for a sample that cannot be read.
    """
    accumulation = microbatches_per_rank(batch, world)
    stream = SampleStream(len(index), seed)
    assignments = (
        assignment for step in range(first_step, last_step) for assignment in deal(stream, batch, rank, world, step)
    )
    microbatches = _load(index, _Training(seed, augmentation), assignments, loader_workers)
    for _ in range(first_step, last_step):
        yield [next(microbatches) for _ in range(accumulation)]


def evaluation_batches(
    index: Index,
    *,
    short_side: int,
    max_size: int,
    microbatch: int,
    rank: int,
    world: int,
    loader_workers: int = 0,
) -> Iterator[Batch]:
    """Every image exactly once over all ranks, unaugmented: sample i goes to rank i % world. A rank without a sample
    yields nothing."""
    mine = range(rank, len(index), world)
    assignments = (
        [(sample, 0) for sample in mine[start : start + microbatch]] for start in range(0, len(mine), microbatch)
    )
    yield from _load(index, _Evaluation(short_side, max_size), assignments, loader_workers)


class _Preparation(Protocol):
    def sample(self, reader: Reader, sample: int, epoch: int) -> Sample: ...


@dataclass(frozen=True)
class _Training:
    seed: int
    augmentation: AugmentationConfig

    def sample(self, reader: Reader, sample: int, epoch: int) -> Sample:
        index = reader.index
        height, width = index.size(sample)
        plan = sample_plan(width, height, self.augmentation, Draws(self.seed, epoch, sample))
        corners, labels = _corner_boxes(index, sample)
        boxes, keep = apply_to_boxes(corners, width, height, plan)
        image = apply_to_image(reader.image(sample), plan)
        return Sample(image, boxes[keep], labels[keep], (height, width), sample, index.image_id(sample))


@dataclass(frozen=True)
class _Evaluation:
    short_side: int
    max_size: int

    def sample(self, reader: Reader, sample: int, epoch: int) -> Sample:
        index = reader.index
        height, width = index.size(sample)
        corners, labels = _corner_boxes(index, sample)
        image = resize_for_evaluation(reader.image(sample), self.short_side, self.max_size)
        boxes = corners * np.array([image.shape[2] / width, image.shape[1] / height] * 2)
        return Sample(image, boxes, labels, (height, width), sample, index.image_id(sample))


def _corner_boxes(index: Index, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) x1, y1, x2, y2 and (n,) labels of the boxes that are no crowd."""
    truth = index.boxes(sample)
    boxes = truth.boxes[~truth.crowd]
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), truth.labels[~truth.crowd]


class _Microbatches(Dataset[Batch | DataError]):
    """Makes the microbatch of an assignment. An error travels as a value: raised in a loader process it would arrive
    wrapped in that process's traceback."""

    def __init__(self, index: Index, preparation: _Preparation) -> None:
        self.reader = Reader(index)
        self.preparation = preparation

    def __getitem__(self, assignment: Assignment) -> Batch | DataError:
        try:
            return collate([self.preparation.sample(self.reader, sample, epoch) for sample, epoch in assignment])
        except DataError as error:
            return error


class _Assignments:
    """An iterator of assignments in the form DataLoader wants its sampler."""

    def __init__(self, assignments: Iterator[Assignment]) -> None:
        self.assignments = assignments

    def __iter__(self) -> Iterator[Assignment]:
        return self.assignments


def _load(
    index: Index, preparation: _Preparation, assignments: Iterator[Assignment], loader_workers: int
) -> Iterator[Batch]:
    dataset = _Microbatches(index, preparation)
    items = (
        iter(_loader(dataset, assignments, loader_workers)) if loader_workers else map(dataset.__getitem__, assignments)
    )
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError) as error:
            if not loader_workers or not _tells_of_a_dead_process(error):
                raise
            raise WorkerLostError(
                f"a loader process died ({' '.join(str(error).split()) or type(error).__name__}): "
                "if memory was short, lower data.loader_workers"
            ) from None
        if isinstance(item, DataError):
            raise item
        yield item


def _tells_of_a_dead_process(error: Exception) -> bool:
    """DataLoader says so itself where it waited for the process; where it was fetching a tensor from it, the
    connection breaks. An error that was raised inside the process says "Caught"."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, EOFError | ConnectionError | FileNotFoundError) and not str(error).startswith("Caught")


def _loader(
    dataset: _Microbatches, assignments: Iterator[Assignment], loader_workers: int
) -> DataLoader[Batch | DataError]:
    context = multiprocessing.get_context("forkserver")  # fork would copy the threads' locks of torch, gloo and Ray
    context.set_forkserver_preload([__name__])  # imports once, not once per process
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Assignments(assignments),
        num_workers=loader_workers,
        collate_fn=_unchanged,
        multiprocessing_context=context,
        worker_init_fn=_ignore_interrupts,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
        generator=torch.Generator(),  # its own, so that reading leaves the training's random state alone
    )


def _unchanged(item: Any) -> Any:
    return item


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
