"""`dino-scale doctor`: is this data fit for use? Nothing is written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_pipeline.doctor import Examination, check_shards, examine
from data_pipeline.findings import EXAMPLES
from dino_scale.errors import DataError, UserError
from launch.commands.pack import phases, runner_of, selection_of


def run(arguments: argparse.Namespace) -> None:
    raw = arguments.annotations is not None and bool(arguments.images)
    if raw == (arguments.shards is not None) or (arguments.annotations is None) == bool(arguments.images):
        raise UserError("doctor: expected either a packed folder, or --annotations and --images of a raw one")
    console = Console(highlight=False, soft_wrap=True)
    if arguments.shards is not None:
        with phases(console) as tell:
            index = check_shards(arguments.shards, lambda done, total: tell("reading shards", done, total))
        boxes, shards = index.manifest.boxes, len(index.shard_names)
        console.print(f"{index.folder}: {len(index)} images, {boxes} boxes, {shards} shard(s): all as packed")
        return
    with runner_of(arguments, console) as runner, phases(console) as tell:
        found = examine(
            arguments.annotations,
            arguments.images,
            arguments.format,
            progress=tell,
            selection=selection_of(arguments),
            runner=runner,
        )
    _show_examination(found, arguments.annotations, console)


def _show_examination(found: Examination, annotations: Path, console: Console) -> None:
    """Raises DataError at the end where there is something that `pack` would stop at."""
    what = "without what is listed as a defect pack would write" if found.defects.counts else "pack would write"
    console.print(
        f"{annotations}: {what} {found.samples} images, {found.boxes} boxes of {found.categories} classes, "
        f"{found.shards} shard(s)"
    )
    for kind, repair in found.report["repairs"].items():
        _show_kind(f"{kind}: {repair['count']}", repair["first"], console)
    for kind, count in sorted(found.defects.counts.items()):
        _show_kind(f"defect: {kind}: {count}", found.defects.examples[kind], console)
    if found.defects.counts:
        raise DataError(
            f"{annotations}: {sum(found.defects.counts.values())} defects of {len(found.defects.counts)} kinds, listed "
            f"above (the first {EXAMPLES} of each kind): pack stops at the first; correct them"
        )


def _show_kind(title: str, places: Sequence[str], console: Console) -> None:
    console.print(f"  {title}", markup=False)
    for place in places:
        console.print(f"    {place}", markup=False)
