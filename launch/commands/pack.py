"""`dino-scale pack`: folders of images and their annotation file into shards with an index."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.pack import pack
from data_pipeline.packing_plan import Selection


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    with phases(console) as tell:
        report = pack(
            arguments.annotations,
            arguments.images,
            arguments.out,
            arguments.format,
            progress=tell,
            selection=selection_of(arguments),
            workers=arguments.workers,
            restart=arguments.restart,
        )
    console.print(f"{report.samples} images, {report.boxes} boxes, {report.shards} shard(s) in {report.out}")
    for kind, count in report.repairs.items():
        console.print(f"  {kind}: {count} (places in {report.out}/report.json)")


def selection_of(arguments: argparse.Namespace) -> Selection:
    return Selection(arguments.first, arguments.also, arguments.also_after, arguments.skip_unreadable)


@contextmanager
def phases(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one per phase in the order in which they are first told of."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def tell(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase)
            bar.update(tasks[phase], completed=done, total=total)

        yield tell
