"""Which checkpoint of a run is meant, and what its weights file must say beside the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.dataset import open_dataset
from dino_scale.checkpoint.export import Exported, export_weights
from dino_scale.checkpoint.layout import BEST, STEP, list_best, list_checkpoints
from dino_scale.checkpoint.manifest import FILE_NAME, read_manifest
from dino_scale.checkpoint.weights import Preparation, load_header
from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig
from dino_scale.errors import DataError, UserError
from dino_scale.structures import Category
from launch.run_folder import CONFIG, WEIGHTS

CHECKPOINTS = "checkpoints"  # R/STAGE/checkpoints


@dataclass(frozen=True)
class Chosen:
    """A checkpoint of a stage of a run."""

    folder: Path
    run: Path
    stage: str
    config: ChainConfig

    def export(self, target: Path, *, averaged: bool) -> Exported:
        """Write its weights file (`export_weights`)."""
        preparation = Preparation.of_stage(self.config.stages[self.stage])
        return export_weights(
            self.folder, target, self.config.model, self._categories(), preparation, averaged=averaged
        )

    def _categories(self) -> tuple[Category, ...]:
        """Of the stage's own weights file once it is there, else of the training shards, which need not be at hand."""
        finished = self.run / self.stage / WEIGHTS
        if finished.is_file():
            return load_header(finished).categories
        data = self.config.stages[self.stage].data
        index = open_dataset(data.train, data.cache, data.cache_shards, data.cache_gigabytes)
        trained_on = read_manifest(self.folder).index_digest
        if trained_on != index.digest:
            raise DataError(
                f"{self.folder}: was trained on another packing of the data (index {trained_on[:12]}, {data.train} has "
                f"{index.digest[:12]}): its classes may differ; put the shards back that it was trained on"
            )
        return index.categories


def choose(source: Path, stage: str | None, *, best: bool) -> Chosen:
    """`source` itself where it is a checkpoint; of a run folder the newest checkpoint, or the best one.

    stage: of a run folder; None: the last one that has such a checkpoint. UserError where there is none.
    """
    if not source.is_dir():
        raise UserError(f"{source} is no folder: expected a checkpoint, R/STAGE/checkpoints/step_XXXXXXXX, or R")
    if (source / FILE_NAME).exists() or source.name.startswith((STEP, BEST)):
        return _given(source, stage, best)
    config = _configuration(source, source)
    stages = list(config.stages) if stage is None else [stage]
    if stage is not None and stage not in config.stages:
        raise UserError(f"--stage is '{stage}': expected one of {', '.join(config.stages)}")
    for name in reversed(stages):
        root = source / name / CHECKPOINTS
        if found := list_best(root) if best else list_checkpoints(root):
            return Chosen(found[-1], source, name, config)
    where = ", ".join(str(source / name / CHECKPOINTS) for name in stages)
    if best:
        raise UserError(f"no best checkpoint in {where}: train with checkpoint.keep_best=true, or leave --best out")
    raise UserError(f"no checkpoint in {where}: the run has not saved one yet")


def _given(folder: Path, stage: str | None, best: bool) -> Chosen:
    if stage is not None or best:
        raise UserError(f"{folder} is a checkpoint: --stage and --best choose one of a run folder; leave them out")
    place = folder.resolve()
    if place.parent.name != CHECKPOINTS:
        raise _misplaced(folder)
    run, name = place.parents[2], place.parents[1].name
    config = _configuration(run, folder)
    if name not in config.stages:
        raise _misplaced(folder)
    return Chosen(folder, run, name, config)


def _configuration(run: Path, named: Path) -> ChainConfig:
    if not (run / CONFIG).is_file():
        raise _misplaced(named)
    return load_chain(run / CONFIG)


def _misplaced(folder: Path) -> UserError:
    return UserError(
        f"{folder}: expected a run folder R, or a checkpoint in its place, R/STAGE/checkpoints/step_XXXXXXXX: "
        f"R/{CONFIG} says which model it is"
    )
