"""The last thing a chain prints: what each stage reached, and what starting from earlier weights was worth."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from dino_scale.evaluation.report import transfer_gains
from dino_scale.evaluation.run_record import read_run
from launch.progress import duration, number
from launch.run_folder import RunFolder


def print_summary(folder: RunFolder, report: Path, console: Console) -> None:
    """A table of stages, the transfer gain of every pair that shows one, and where the report is."""
    table = Table(title=folder.config.name, title_justify="left")
    table.add_column("stage")
    for title in ("steps", "AP", "AP50", "time"):
        table.add_column(title, justify="right")
    for name, stage in folder.stages.items():
        scores = [number(stage.metrics.get(metric, -1.0)) for metric in ("AP", "AP50")]
        table.add_row(name, str(stage.step), *scores, duration(stage.seconds))
    console.print(table)
    for gain in transfer_gains(read_run(folder.path).stages):
        pairs = {metric: gain.numbers(metric) for metric in ("AP", "AP50")}
        figures = ", ".join(f"{metric} {number(a)} against {number(b)}" for metric, (a, b) in pairs.items())
        console.print(f"transfer: {gain.started.name} against {gain.scratch.name} (from scratch): {figures}")
    console.print(f"report: {report}", soft_wrap=True)
