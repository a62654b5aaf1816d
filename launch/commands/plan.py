"""`dino-scale plan`: the plan of a chain as tables."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig
from dino_scale.errors import UserError
from launch.plan import ASSUMED_CLASSES, DataPlan, StagePlan, group_tables, plan_stages
from launch.plan_memory import ModelSize
from launch.plan_needs import Measured, StageNeeds
from launch.plan_tables import costs, demands

_FILE_WIDTH = 120  # of tables that do not go to a terminal


def run(arguments: argparse.Namespace) -> None:
    config = load_chain(arguments.chain, arguments.overrides)
    stages = plan_stages(config, _images(arguments.images, config))
    classes = max((stage.train.classes or 0 for stage in stages), default=0)
    known = classes or ASSUMED_CLASSES
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(_stage_table(config, stages))
    for line in _missing(stages):
        console.print(line, soft_wrap=True)
    measured: Measured = {}
    needs = {
        stage.name: StageNeeds(
            config, stage.name, known, stage.workers, arguments.device, measured, arguments.image_size
        )
        for stage in stages
    }
    console.print(_model_line(needs[stages[0].name].size, classes), soft_wrap=True)
    for rows, names in group_tables(config, known).items():
        console.print(_group_table(rows, names))
    for stages_alike in _alike(stages, config):
        for part in demands(stages_alike, needs[stages_alike[0].name], arguments.gpu_memory):
            console.print(part, soft_wrap=isinstance(part, str))
    for part in costs(stages, arguments):
        console.print(part, soft_wrap=isinstance(part, str))


def _images(stated: list[tuple[str, int]], config: ChainConfig) -> dict[str, int]:
    for name, _ in stated:
        if name not in config.stages:
            raise UserError(f"--images {name}=N: expected one of the stages {', '.join(config.stages)}")
    return dict(stated)


def _alike(stages: list[StagePlan], config: ChainConfig) -> list[list[StagePlan]]:
    """Stages whose memory and traffic are the same, together."""
    groups: dict[str, list[StagePlan]] = {}
    for stage in stages:
        own = config.stages[stage.name]
        average = own.ema_decay > 0
        key = (own.batch, own.augmentation, own.data.pad_multiple, own.data.loader_workers, own.optimizer)
        groups.setdefault(repr((*key, own.precision, own.zero_stage, own.loss, average)), []).append(stage)
    return list(groups.values())


def _stage_table(config: ChainConfig, stages: list[StagePlan]) -> Table:
    table = Table(title=f"{config.name}: {len(stages)} stage(s), engine {config.launch.engine}", title_justify="left")
    table.add_column("stage")
    for title in ("steps", "epochs", "global batch", "train images", "shards", "validation images", "ZeRO"):
        table.add_column(title, justify="right")
    for stage in stages:
        batch = f"{stage.global_size} = {stage.microbatch} x {stage.workers} workers x {stage.accumulation}"
        epochs = "?" if stage.epochs is None else f"{stage.epochs:.2f}"
        validation = "none" if stage.validation is None else _count(stage.validation.images)
        row = (_count(stage.steps), epochs, batch, _count(stage.train.images), _count(stage.train.shards), validation)
        table.add_row(stage.name, *row, str(stage.zero_stage))
    return table


def _missing(stages: list[StagePlan]) -> list[str]:
    """One line per data folder that is not there yet."""
    lines = []
    for stage in stages:
        pairs: list[tuple[str, DataPlan | None]] = [("train", stage.train), ("validation", stage.validation)]
        for key, data in pairs:
            if data is not None and data.images is None:
                where = f"'{data.folder}' does not exist yet" if data.folder else "is empty"
                lines.append(f"stages.{stage.name}.data.{key} {where}: what depends on it is shown as ?")
    return lines


def _model_line(size: ModelSize, classes: int) -> str:
    assumed = "" if classes else " (assumed: no data is there to count them)"
    return (
        f"model: {size.parameters:,} parameters, {sum(size.frozen):,} of them frozen, "
        f"with {classes or ASSUMED_CLASSES} classes{assumed}"
    )


def _group_table(rows: tuple[tuple[str, ...], ...], stages: list[str]) -> Table:
    table = Table(title=f"what trains in {', '.join(stages)}", title_justify="left")
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
