"""`dino-scale plan`: the plan of a chain as tables."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig
from launch.plan import ASSUMED_CLASSES, DataPlan, ModelSize, StagePlan, group_tables, memory, model_size, plan_stages

_MEGABYTE = 1e6


def run(arguments: argparse.Namespace) -> None:
    config = load_chain(arguments.chain, arguments.overrides)
    stages = plan_stages(config)
    classes = max((stage.train.classes or 0 for stage in stages), default=0)
    size = model_size(config.model, classes or ASSUMED_CLASSES)
    console = Console(highlight=False)
    console.print(_stage_table(config, stages))
    for line in _missing(stages):
        console.print(line, soft_wrap=True)
    console.print(_model_line(size, classes), soft_wrap=True)
    for rows, names in group_tables(config, classes or ASSUMED_CLASSES).items():
        console.print(_group_table(rows, names))
    console.print(_memory_table(config, size, stages[0].workers))


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
        f"model: {size.trained + size.frozen:,} parameters, {size.frozen:,} of them frozen, "
        f"with {classes or ASSUMED_CLASSES} classes{assumed}"
    )


def _group_table(rows: tuple[tuple[str, ...], ...], stages: list[str]) -> Table:
    table = Table(title=f"what trains in {', '.join(stages)}", title_justify="left")
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _memory_table(config: ChainConfig, size: ModelSize, workers: int) -> Table:
    average = any(stage.ema_decay > 0 for stage in config.stages.values())
    title = f"MB per worker that stay from step to step, {workers} worker(s), without activations and images"
    table = Table(title=title, title_justify="left")
    for heading in ("ZeRO stage", "parameters", "gradients", "optimizer", "average", "total"):
        table.add_column(heading, justify="right")
    for zero_stage in range(4):
        need = memory(size, zero_stage, workers, average)
        parts = (need.parameters, need.gradients, need.optimizer, need.average, need.total)
        table.add_row(str(zero_stage), *(f"{part / _MEGABYTE:,.1f}" for part in parts))
    return table


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
