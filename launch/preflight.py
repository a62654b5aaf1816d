"""What can be known to fail before any worker starts: missing data or weights, batches that do not divide."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from data_pipeline.dataset import is_remote, open_dataset
from dino_scale.config.schema import ChainConfig, StageConfig, WorkerRange
from dino_scale.errors import ConfigError, DataError
from launch.elastic import worker_counts


def with_absolute_paths(config: ChainConfig) -> ChainConfig:
    """Paths of data and weights made independent of the working directory: a run may be resumed from another one."""
    backbone = replace(config.model.backbone, weights=_absolute(config.model.backbone.weights))
    stages = {
        name: replace(
            stage,
            data=replace(
                stage.data,
                train=_absolute(stage.data.train),
                validation=_absolute(stage.data.validation),
                cache=_absolute(stage.data.cache),
            ),
            start=replace(stage.start, weights=_absolute(stage.start.weights)),
        )
        for name, stage in config.stages.items()
    }
    return replace(config, model=replace(config.model, backbone=backbone), stages=stages)


def check(config: ChainConfig, workers: WorkerRange) -> None:
    """ConfigError or DataError, naming stage and key, for what no worker could run."""
    _require_file(config.model.backbone.weights, "model.backbone.weights")
    for name, stage in config.stages.items():
        _check_data(name, stage)
        _require_file(stage.start.weights, f"stages.{name}.start.weights")
        try:
            worker_counts(stage.batch, workers)
        except ConfigError as error:
            raise ConfigError(f"stages.{name}.{error}") from None


def _check_data(name: str, stage: StageConfig) -> None:
    for key, folder in (("train", stage.data.train), ("validation", stage.data.validation)):
        if not folder and key == "train":
            raise ConfigError(f"stages.{name}.data.train is empty: expected a folder made by `dino-scale pack`")
        if not folder:
            continue
        try:
            open_dataset(folder, stage.data.cache, stage.data.cache_shards, stage.data.cache_gigabytes)
        except DataError as error:
            raise DataError(f"stages.{name}.data.{key}: {error}") from None


def _require_file(path: str, key: str) -> None:
    if path and not Path(path).is_file():
        raise ConfigError(f"{key} is '{path}': there is no such file")


def _absolute(path: str) -> str:
    return path if not path or is_remote(path) else os.path.abspath(path)
