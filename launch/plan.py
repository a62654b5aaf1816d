"""What a chain will need and do, worked out without data loaders, weights or accelerators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.dataset import is_remote, open_dataset
from data_pipeline.loader import microbatches_per_rank
from dino_scale.config.schema import ChainConfig, ModelConfig, StageConfig, WorkerRange
from dino_scale.errors import ConfigError, DataError
from dino_scale.model.dino import Dino, build_model
from dino_scale.training.optimizer import group_table, parameter_groups
from dino_scale.training.schedule import total_steps
from launch.elastic import worker_counts

ASSUMED_CLASSES = 80  # where no data is there to count them
_FLOAT_BYTES = 4  # parameters, gradients and moments are float32; bf16 is autocast only


@dataclass(frozen=True)
class DataPlan:
    """A packed folder. images, classes, shards: None where the folder is not there (yet)."""

    folder: str
    images: int | None = None
    classes: int | None = None
    shards: int | None = None


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


@dataclass(frozen=True)
class ModelSize:
    """Numbers of elements. buffers: persistent ones, such as frozen batch statistics."""

    trained: int
    frozen: int
    buffers: int


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds from step to step, without activations and images."""

    zero_stage: int
    parameters: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average


def plan_stages(config: ChainConfig) -> list[StagePlan]:
    """ConfigError where a batch does not divide among the workers."""
    workers = WorkerRange(1, 1) if config.launch.engine == "local" else config.launch.worker_range()
    return [_plan_stage(name, stage, workers) for name, stage in config.stages.items()]


def model_size(config: ModelConfig, classes: int) -> ModelSize:
    """Counted on a model without storage."""
    model = _without_storage(config, classes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    persistent = model.state_dict().keys()
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in persistent)
    return ModelSize(trained, frozen, buffers)


def group_tables(config: ChainConfig, classes: int) -> dict[tuple[tuple[str, ...], ...], list[str]]:
    """Every different table of parameter groups in the chain (headings first), and the stages that have it."""
    model = _without_storage(config.model, classes)
    tables: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name, stage in config.stages.items():
        tables.setdefault(tuple(group_table(parameter_groups(model, stage.optimizer))), []).append(name)
    return tables


def _without_storage(config: ModelConfig, classes: int) -> Dino:
    with torch.device("meta"):
        return build_model(config, classes, pretrained=False)


def memory(size: ModelSize, zero_stage: int, workers: int, average: bool) -> Memory:
    """What DeepSpeed keeps: from stage 1 a float32 master copy and the moments are split, from 2 the gradients too,
    in stage 3 also the parameters. Stage 0 keeps everything whole and needs no master copy."""

    def share(elements: int, from_stage: int) -> int:
        return -(-elements // workers) if zero_stage >= from_stage else elements

    masters_and_moments = 3 if zero_stage > 0 else 2
    return Memory(
        zero_stage,
        parameters=_FLOAT_BYTES * (share(size.trained + size.frozen, 3) + size.buffers),
        gradients=_FLOAT_BYTES * share(size.trained, 2),
        optimizer=_FLOAT_BYTES * masters_and_moments * share(size.trained, 1),
        average=_FLOAT_BYTES * share(size.trained, 1) if average else 0,
    )


def _plan_stage(name: str, stage: StageConfig, bounds: WorkerRange) -> StagePlan:
    try:
        workers = worker_counts(stage.batch, bounds)[0]
        accumulation = microbatches_per_rank(stage.batch, workers)
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None
    train = _plan_data(stage.data.train, f"stages.{name}.data.train")
    validation = _plan_data(stage.data.validation, f"stages.{name}.data.validation") if stage.data.validation else None
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
    return DataPlan(folder, len(index), len(index.categories), len(index.shard_names))
