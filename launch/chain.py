"""Running the stages of a chain in order, on whatever engine, so that a stop at any moment can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from data_pipeline.dataset import open_dataset
from data_pipeline.index import Index
from data_pipeline.reader import read_image
from dino_scale.config.schema import ChainConfig
from dino_scale.errors import DinoScaleError, Interrupted, WorkerLostError
from dino_scale.evaluation.report import write_report
from dino_scale.training.control import Event, StepEvent
from launch.engine import Engine
from launch.progress import Progress, duration, metrics_line
from launch.run_folder import RunFolder, State
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult


def run_chain(folder: RunFolder, engine: Engine, progress: Progress) -> Path:
    """Run every stage that is not done, then write the report; its path.

    Called in every process of the engine; only the primary one writes. Raises Interrupted after a stop on request.
    """
    with StopRequest() as stop:
        while (name := engine.on_primary(folder.next_stage)) is not None:
            _run_stage(name, folder, engine, progress, stop)
    return engine.on_primary(lambda: write_run_report(folder.path, folder.config))


def write_run_report(path: Path, config: ChainConfig) -> Path:
    """The report of a run folder, with pictures of each stage's validation data."""
    return write_report(path, _image_source(config))


def _run_stage(name: str, folder: RunFolder, engine: Engine, progress: Progress, stop: StopRequest) -> None:
    attempt = _Attempt(name, folder, progress)
    if engine.is_primary:
        attempt.begin()
    try:
        result = engine.run(StageJob(str(folder.path), name, folder.config), stop, attempt.see)
    except BaseException as error:
        if engine.is_primary:
            attempt.fail(error)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"stage {name} was stopped at once; {_how_to_resume(folder)}") from None
        if isinstance(error, WorkerLostError):
            raise type(error)(f"stage {name}: {error}; {_how_to_resume(folder)}") from None
        raise
    if engine.is_primary:
        attempt.end(result)
    if result.interrupted:
        raise Interrupted(f"stage {name} was stopped at step {result.step}; {_how_to_resume(folder)}")


def _how_to_resume(folder: RunFolder) -> str:
    return f"continue with: dino-scale resume {folder.path}"


class _Attempt:
    """One try at a stage, as it is written to chain.json and shown."""

    def __init__(self, name: str, folder: RunFolder, progress: Progress) -> None:
        self.name, self.folder, self.progress = name, folder, progress
        self.started = time.monotonic()
        self.step = folder.stages[name].step

    def begin(self) -> None:
        names = list(self.folder.stages)
        self.progress.begin_stage(self.name, names.index(self.name) + 1, len(names))
        self.folder.record(self.name, "running", self.step, {}, 0.0)

    def see(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self.step = event.step
        self.progress(event)

    def end(self, result: StageResult) -> None:
        seconds = time.monotonic() - self.started
        state: State = "interrupted" if result.interrupted else "done"
        self.folder.record(self.name, state, result.step, result.metrics, seconds)
        if not result.interrupted:
            total = duration(self.folder.stages[self.name].seconds)
            measured = f", {metrics_line(result.metrics)}" if result.metrics else ""
            self.progress.message(f"stage {self.name}: done after {result.step} steps and {total}{measured}")

    def fail(self, error: BaseException) -> None:
        """An error of ours that would come again is a failure; everything else can be resumed as it is."""
        resumable = isinstance(error, KeyboardInterrupt | WorkerLostError) or not isinstance(error, DinoScaleError)
        state: State = "interrupted" if resumable else "failed"
        self.folder.record(self.name, state, self.step, {}, time.monotonic() - self.started)


def _image_source(config: ChainConfig) -> Callable[[str, int], np.ndarray]:
    @cache
    def opened(stage: str) -> Index:
        data = config.stages[stage].data
        return open_dataset(data.validation, data.cache, data.cache_shards, data.cache_gigabytes)

    return lambda stage, image_id: read_image(opened(stage), image_id)
