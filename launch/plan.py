"""What a chain will need and do, worked out without data loaders, weights or accelerators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.dataset import is_remote, open_dataset
from data_pipeline.loader import microbatches_per_rank
from dino_scale.config.schema import ChainConfig, StageConfig, WorkerRange
from dino_scale.errors import ConfigError, DataError
from dino_scale.training.optimizer import group_table, parameter_groups
from dino_scale.training.schedule import total_steps
from launch.elastic import worker_counts
from launch.plan_memory import without_storage

ASSUMED_CLASSES = 80  # where no data is there to count them


@dataclass(frozen=True)
class DataPlan:
    """A packed folder. images, classes, shards, bytes (of the images): None where the folder is not there (yet)."""

    folder: str
    images: int | None = None
    classes: int | None = None
    shards: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """steps, epochs: None where the data that decides them is not there."""

    name: str
    train: DataPlan
    validation: DataPlan | None
    steps: int | None
    epochs: float | None
    global_size: int
    microbatch: int
    workers: int
    accumulation: int
    zero_stage: int


def plan_stages(config: ChainConfig, images: Mapping[str, int] | None = None) -> list[StagePlan]:
    """images: of stages whose training data is not there yet. ConfigError where a batch does not divide."""
    bounds = WorkerRange(1, 1) if config.launch.engine == "local" else config.launch.worker_range()
    known = images or {}
    return [_plan_stage(name, stage, bounds, known.get(name)) for name, stage in config.stages.items()]


def group_tables(config: ChainConfig, classes: int) -> dict[tuple[tuple[str, ...], ...], list[str]]:
    """Every different table of parameter groups in the chain (headings first), and the stages that have it."""
    model = without_storage(config.model, classes)
    tables: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name, stage in config.stages.items():
        tables.setdefault(tuple(group_table(parameter_groups(model, stage.optimizer))), []).append(name)
    return tables


def largest_image(stage: StageConfig, microbatch: int) -> tuple[int, int]:
    """Padded (height, width) in pixels that a microbatch can come to: a wide image beside a tall one is the worst."""
    longest = stage.augmentation.max_size
    short = longest if microbatch > 1 else min(max(stage.augmentation.scales), longest)
    height, width = (-(-side // stage.data.pad_multiple) * stage.data.pad_multiple for side in (short, longest))
    return height, width


def possible_microbatches(global_size: int, workers: int) -> list[int]:
    """Powers of two up to 8 that divide every worker's share of the global batch."""
    share = global_size // workers
    return [size for size in (1, 2, 4, 8) if share % size == 0]


def _plan_stage(name: str, stage: StageConfig, bounds: WorkerRange, images: int | None) -> StagePlan:
    try:
        workers = worker_counts(stage.batch, bounds)[0]
        accumulation = microbatches_per_rank(stage.batch, workers)
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None
    train = _plan_data(stage.data.train, f"stages.{name}.data.train")
    validation = _plan_data(stage.data.validation, f"stages.{name}.data.validation") if stage.data.validation else None
    if train.images is None:
        train = replace(train, images=images)
    steps: int | None = stage.schedule.steps or None
    if train.images:
        steps = total_steps(stage.schedule, train.images, stage.batch.global_size)
    epochs = steps * stage.batch.global_size / train.images if steps and train.images else stage.schedule.epochs or None
    return StagePlan(
        name=name,
        train=train,
        validation=validation,
        steps=steps,
        epochs=epochs,
        global_size=stage.batch.global_size,
        microbatch=stage.batch.microbatch,
        workers=workers,
        accumulation=accumulation,
        zero_stage=stage.zero_stage,
    )


def _plan_data(folder: str, key: str) -> DataPlan:
    """A folder that is there must be whole; one that is not there yet is no error."""
    if not folder or (not is_remote(folder) and not Path(folder).exists()):
        return DataPlan(folder)
    try:
        index = open_dataset(folder)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    size = int(index.columns["image_sizes"].sum())
    return DataPlan(folder, len(index), len(index.categories), len(index.shard_names), size)
