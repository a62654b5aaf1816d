"""`dino-scale reshard`: a checkpoint in another number of files."""

from __future__ import annotations

import argparse

from rich.console import Console

from dino_scale.checkpoint.manifest import read_manifest
from dino_scale.checkpoint.ranges import ITEM
from dino_scale.checkpoint.reshard import elements, reshard
from dino_scale.errors import UserError
from launch.commands.inspect import require_checkpoint


def run(arguments: argparse.Namespace) -> None:
    require_checkpoint(arguments.checkpoint)
    parts = arguments.parts
    if parts is None:
        parts = _parts_of_size(arguments)
    reshard(arguments.checkpoint, arguments.out, parts)
    Console(highlight=False, soft_wrap=True).print(f"{arguments.out}: {parts} shard(s), the same state")


def _parts_of_size(arguments: argparse.Namespace) -> int:
    """As many parts as keep every one within --megabytes."""
    if arguments.megabytes <= 0:
        raise UserError(f"--megabytes is {arguments.megabytes:g}: expected above 0")
    manifest = read_manifest(arguments.checkpoint)
    total = ITEM * elements(manifest) * len(manifest.kinds)
    return max(1, -(-total // int(arguments.megabytes * 1e6)))
