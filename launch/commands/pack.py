"""`dino-scale pack`: folders of images and their annotation file into shards with an index."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.pack import pack
from data_pipeline.packing_plan import Selection
from data_pipeline.tasks import LocalProcesses, Runner
from dino_scale.training.control import Event, MessageEvent
from launch.progress import duration

LINE_SECONDS = 60.0  # between two lines about progress where there is no terminal


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    with runner_of(arguments, console) as runner, phases(console) as tell:
        report = pack(
            arguments.annotations,
            arguments.images,
            arguments.out,
            arguments.format,
            progress=tell,
            selection=selection_of(arguments),
            runner=runner,
            restart=arguments.restart,
        )
    console.print(f"{report.samples} images, {report.boxes} boxes, {report.shards} shard(s) in {report.out}")
    for kind, count in report.repairs.items():
        console.print(f"  {kind}: {count} (each in {report.out}/repairs.jsonl)")


def selection_of(arguments: argparse.Namespace) -> Selection:
    return Selection(arguments.first, arguments.also, arguments.also_after, arguments.skip_unreadable)


@contextmanager
def runner_of(arguments: argparse.Namespace, console: Console) -> Iterator[Runner]:
    """Who does the work: processes of this machine, or with --address tasks of Ray."""
    if arguments.address is None:
        yield LocalProcesses(min(8, os.cpu_count() or 1) if arguments.workers is None else arguments.workers)
        return
    from launch.ray_tasks import RayTasks  # late: Ray is slow to import

    _make_absolute(arguments)
    with RayTasks(arguments.address, arguments.workers, lambda event: _say(event, console)) as runner:
        yield runner


def _make_absolute(arguments: argparse.Namespace) -> None:
    """All paths: tasks work in a folder of their own."""
    for name, value in vars(arguments).items():
        if isinstance(value, Path):
            setattr(arguments, name, value.absolute())
    arguments.images = [folder.absolute() for folder in arguments.images or ()]


def _say(event: Event, console: Console) -> None:
    if isinstance(event, MessageEvent):
        console.print(event.text)


@contextmanager
def phases(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one per phase in the order in which they are first told of; a line a minute without a terminal."""
    if not console.is_terminal:
        yield _Lines(console, clock)
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True) as bar:

        def tell(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase)
            bar.update(tasks[phase], completed=done, total=total)

        yield tell


class _Lines:
    """Says how far a phase is when LINE_SECONDS have gone by since the last line, or since the start."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self.console, self.clock = console, clock
        self.begin = self.last = clock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self.clock()
        if now - self.last < LINE_SECONDS:
            return
        self.last = now
        share = f"{done / total:.0%}" if total else "all"
        self.console.print(f"{phase}: {done} of {total} ({share}), {duration(now - self.begin)} since the start")
