"""`dino-scale pack`: a folder of images and its annotation file into shards with an index."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.pack import pack


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("packing", total=None)
        report = pack(
            arguments.annotations,
            arguments.images,
            arguments.out,
            arguments.format,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(f"{report.samples} images, {report.boxes} boxes, {report.shards} shard(s) in {report.out}")
    for kind, count in report.repairs.items():
        console.print(f"  {kind}: {count} (places in {report.out}/report.json)")
