"""`dino-scale doctor`: is this data fit for use? Nothing is written."""

from __future__ import annotations

import argparse

from rich.console import Console

from data_pipeline.doctor import check_shards, examine
from dino_scale.errors import UserError
from launch.commands.pack import phases, runner_of, selection_of


def run(arguments: argparse.Namespace) -> None:
    raw = arguments.annotations is not None and bool(arguments.images)
    if raw == (arguments.shards is not None) or (arguments.annotations is None) == bool(arguments.images):
        raise UserError("doctor: expected either a packed folder, or --annotations and --images of a raw one")
    console = Console(highlight=False, soft_wrap=True)
    if arguments.shards is not None:
        _require_no_raw_options(arguments)
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
    console.print(
        f"{arguments.annotations}: pack would write {found.samples} images, {found.boxes} boxes of "
        f"{found.categories} classes, {found.shards} shard(s)"
    )
    for kind, repair in found.report["repairs"].items():
        console.print(f"  {kind}: {repair['count']}", markup=False)
        for place in repair["first"]:
            console.print(f"    {place}", markup=False)


def _require_no_raw_options(arguments: argparse.Namespace) -> None:
    """UserError for an option that would do nothing: a packed folder is read by this process, as it is."""
    given = {
        "--format": arguments.format != "coco",
        "--workers": arguments.workers is not None,
        "--address": arguments.address is not None,
        "--first": arguments.first != 0,
        "--also": arguments.also is not None,
        "--also-after": arguments.also_after != 0,
        "--skip-unreadable": arguments.skip_unreadable,
    }
    for option, is_given in given.items():
        if is_given:
            raise UserError(
                f"doctor: {option} is about a raw folder, but {arguments.shards} is a packed one, which one process "
                "reads as it is: leave the option out"
            )
