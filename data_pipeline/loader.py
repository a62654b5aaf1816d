"""Microbatches for one worker of any number: who gets what is a pure function, and so is every pixel.

The sample stream is the epochs' orders one after another. Global batch k is stream[k * G : (k + 1) * G], microbatch j
of it its j-th slice, and rank r takes the A = G / (microbatch * world) microbatches from r * A on.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.collate import Sample, collate
from data_pipeline.index import Index
from data_pipeline.order import Draws, SampleStream, Stream, WindowedStream
from data_pipeline.reader import Reader
from data_pipeline.replacement import BadSample, find_replacement
from data_pipeline.size_order import SizePlannedStream
from data_pipeline.transforms import apply_to_boxes, apply_to_image, resize_for_evaluation, sample_plan
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import ConfigError, DataError, WorkerLostError
from dino_scale.structures import Batch

Assignment = list[tuple[int, int]]  # (sample id, epoch) of every image of a microbatch
StreamMode = Literal["permutation", "windowed", "size_planned"]
OnBad = Callable[[BadSample], None]
PREFETCH = 4  # microbatches that each loader process prepares ahead


def microbatches_per_rank(batch: BatchConfig, world: int) -> int:
    """Accumulation A. Raises ConfigError where the global batch does not divide."""
    if batch.global_size % (batch.microbatch * world):
        raise ConfigError(
            f"batch.global_size is {batch.global_size}: expected a multiple of batch.microbatch x workers = "
            f"{batch.microbatch} x {world} = {batch.microbatch * world}: change one of them"
        )
    return batch.global_size // (batch.microbatch * world)


def deal(stream: Stream, batch: BatchConfig, rank: int, world: int, step: int) -> list[Assignment]:
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
    order: StreamMode = "permutation",
    pad_multiple: int = 1,
    on_bad: OnBad | None = None,
    pin: bool = False,
) -> Iterator[list[Batch]]:
    """One item per global step first_step, ..., last_step - 1: this rank's microbatches, in order.

    Crowd boxes are left out; images without boxes are kept. Augmentation draws depend on (seed, epoch, sample id).
    loader_workers: processes that read ahead; 0: read in this process. A sample that cannot be read is replaced by the
    next one of the stream that can (see `replacement.py`), told to `on_bad` and counted in `Batch.replaced`.
    pin: batches in page-locked memory, ready for a GPU; with loader processes a thread does that on the way.
    Raises ConfigError where the global batch does not divide, DataError where many samples in a row cannot be read.
    """
    accumulation = microbatches_per_rank(batch, world)
    stream = sample_stream(index, seed, augmentation, batch, order)
    tasks = (
        _Task(assignment, (step * batch.global_size // batch.microbatch + rank * accumulation + j) * batch.microbatch)
        for step in range(first_step, last_step)
        for j, assignment in enumerate(deal(stream, batch, rank, world, step))
    )
    dataset = _Microbatches(index, TrainingPreparation(seed, augmentation), stream, pad_multiple)
    microbatches = _load(dataset, tasks, loader_workers, on_bad, pin)
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
    tasks = (
        _Task([(sample, 0) for sample in mine[start : start + microbatch]], 0)
        for start in range(0, len(mine), microbatch)
    )
    yield from _load(_Microbatches(index, _Evaluation(short_side, max_size)), tasks, loader_workers)


def sample_stream(
    index: Index, seed: int, augmentation: AugmentationConfig, batch: BatchConfig, order: StreamMode
) -> Stream:
    """The stream of a training run. `windowed` depends on the shards too, `size_planned` on the microbatch and the
    augmentation."""
    if order == "size_planned":
        return SizePlannedStream(len(index), seed, batch.microbatch, _PlannedSize(index, seed, augmentation))
    if order == "windowed":
        return WindowedStream(len(index), seed, _Shards(index))
    return SampleStream(len(index), seed)


@dataclass(frozen=True)
class _Shards:
    """The shard of every sample; travels between processes as the index does."""

    index: Index

    def __call__(self) -> np.ndarray:
        return self.index.columns["shards"]


@dataclass(frozen=True)
class _PlannedSize:
    """Size of a sample after augmentation, before a byte of it is read."""

    index: Index
    seed: int
    augmentation: AugmentationConfig

    def __call__(self, sample: int, epoch: int) -> tuple[int, int]:
        height, width = self.index.size(sample)
        return sample_plan(width, height, self.augmentation, Draws(self.seed, epoch, sample)).size


class _Preparation(Protocol):
    def sample(self, reader: Reader, sample: int, epoch: int) -> Sample: ...


@dataclass(frozen=True)
class TrainingPreparation:
    """A sample as training sees it: augmented by draws of (seed, epoch, sample), without crowd boxes."""

    seed: int
    augmentation: AugmentationConfig

    def sample(self, reader: Reader, sample: int, epoch: int) -> Sample:
        index = reader.index
        height, width = index.size(sample)
        plan = sample_plan(width, height, self.augmentation, Draws(self.seed, epoch, sample))
        corners, labels = _corner_boxes(index, sample)
        boxes, keep = apply_to_boxes(corners, width, height, plan)
        image = apply_to_image(reader.image(sample), plan, self.augmentation.executor)
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


@dataclass(frozen=True)
class _Task:
    """A microbatch to make. first: position in the stream of its first sample."""

    assignment: Assignment
    first: int


@dataclass(frozen=True)
class _Made:
    batch: Batch
    bad: tuple[BadSample, ...]

    def pin_memory(self) -> _Made:
        """DataLoader's thread calls this by its name."""
        return replace(self, batch=self.batch.pin_memory())


class _Microbatches(Dataset[_Made | DataError]):
    """Makes the microbatch of a task. An error travels as a value: raised in a loader process it would arrive wrapped
    in that process's traceback. stream: where replacements come from; None: a sample that cannot be read is an error.
    """

    def __init__(
        self, index: Index, preparation: _Preparation, stream: Stream | None = None, pad_multiple: int = 1
    ) -> None:
        self.reader = Reader(index)
        self.preparation = preparation
        self.stream = stream
        self.pad_multiple = pad_multiple

    def __getitem__(self, task: _Task) -> _Made | DataError:
        samples: list[Sample] = []
        bad: list[BadSample] = []
        self.reader.prefetch([sample for sample, _ in task.assignment])
        try:
            for position, (sample, epoch) in enumerate(task.assignment, start=task.first):
                samples.append(self._sample_or_replacement(position, sample, epoch, bad))
        except DataError as error:
            return error
        return _Made(replace(collate(samples, self.pad_multiple), replaced=len(bad)), tuple(bad))

    def _sample_or_replacement(self, position: int, sample: int, epoch: int, bad: list[BadSample]) -> Sample:
        def read(number: int, of_epoch: int) -> Sample:
            return self.preparation.sample(self.reader, number, of_epoch)

        try:
            return read(sample, epoch)
        except DataError as error:
            if self.stream is None:
                raise
            substitute = find_replacement(self.stream, position, read, error)
            index = self.reader.index
            shard = index.shard_names[int(index.columns["shards"][sample])]
            bad.append(
                BadSample(
                    position=position,
                    sample_id=sample,
                    image_id=index.image_id(sample),
                    file_name=index.file_name(sample),
                    shard=shard,
                    reason=str(error),
                    replaced_by=substitute.image_id,
                )
            )
            return substitute


class _Tasks:
    """An iterator of tasks in the form DataLoader wants its sampler."""

    def __init__(self, tasks: Iterator[_Task]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[_Task]:
        return self.tasks


def _load(
    dataset: _Microbatches,
    tasks: Iterator[_Task],
    loader_workers: int,
    on_bad: OnBad | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    items = iter(_loader(dataset, tasks, loader_workers, pin)) if loader_workers else map(dataset.__getitem__, tasks)
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
        for bad in item.bad:
            if on_bad is not None:
                on_bad(bad)
        yield item.batch if loader_workers or not pin else item.batch.pin_memory()


def _tells_of_a_dead_process(error: Exception) -> bool:
    """DataLoader says so itself where it waited for the process; where it was fetching a tensor from it, the
    connection breaks, in this process or in its thread that pins memory. An error that was raised inside the loader
    process says "Caught" too, but names that process."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith(("DataLoader worker", "Pin memory thread exited"))
    here = not text.startswith("Caught") or " in pin memory thread " in text.partition("\n")[0]
    return isinstance(error, EOFError | ConnectionError | FileNotFoundError) and here


def _loader(
    dataset: _Microbatches, tasks: Iterator[_Task], loader_workers: int, pin: bool
) -> DataLoader[_Made | DataError]:
    context = multiprocessing.get_context("forkserver")  # fork would copy the threads' locks of torch, gloo and Ray
    context.set_forkserver_preload([__name__])  # imports once, not once per process
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Tasks(tasks),
        num_workers=loader_workers,
        collate_fn=_unchanged,
        multiprocessing_context=context,
        worker_init_fn=_ignore_interrupts,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
        pin_memory=pin,
        generator=torch.Generator(),  # its own, so that reading leaves the training's random state alone
    )


def _unchanged(item: Any) -> Any:
    return item


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
