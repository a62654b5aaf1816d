"""`dino-scale inspect`: what a checkpoint holds, as tables or JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dino_scale.checkpoint.inspection import Inspection, inspect
from dino_scale.checkpoint.manifest import Manifest
from dino_scale.errors import CheckpointError, UserError

_MEGABYTE = 1e6


def run(arguments: argparse.Namespace) -> None:
    """Print what is there; CheckpointError (exit code 3) after it when a file is damaged."""
    require_checkpoint(arguments.checkpoint)
    found = inspect(arguments.checkpoint, arguments.verify)
    if arguments.json:
        print(json.dumps(_as_json(found), indent=1))
    else:
        _show(arguments.checkpoint, found)
    if found.problems:
        raise CheckpointError(f"{arguments.checkpoint}: {'; '.join(found.problems)}")


def require_checkpoint(folder: Path) -> None:
    """UserError unless `folder` is a folder, with a hint where it holds checkpoints rather than being one."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected a checkpoint, such as R/STAGE/checkpoints/step_00001000")
    inside = sorted(path.name for path in folder.glob("step_*"))
    if inside:
        raise UserError(f"{folder} holds checkpoints: name one of them, such as {folder / inside[-1]}")


def _as_json(found: Inspection) -> dict[str, Any]:
    manifest = json.loads(found.manifest.to_json())
    for bulky in ("pieces", "files"):
        del manifest[bulky]
    return manifest | {
        "elements": found.elements,
        "bytes": found.bytes,
        "verified": found.verified,
        "files": [vars(state) for state in found.files],
    }


def _show(folder: Path, found: Inspection) -> None:
    console = Console(highlight=False, soft_wrap=True)
    manifest = found.manifest
    console.print(str(folder))
    skipped = f" ({manifest.skipped_steps} skipped)" if manifest.skipped_steps else ""
    for name, value in (
        ("step", f"{manifest.step:,}{skipped}, {manifest.samples_seen:,} samples seen"),
        ("written by", f"{manifest.world_size} worker(s), ZeRO {manifest.zero_stage}, {_precision(manifest)}"),
        ("kinds", ", ".join(manifest.kinds)),
        ("trained parameters", f"{found.elements:,} in {found.tensors} tensors"),
        ("size", f"{found.bytes / _MEGABYTE:,.1f} MB in {len(found.files)} files"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())),
    ):
        console.print(f"  {name:<20}{value}")
    if manifest.groups:
        console.print(_group_table(manifest))
    files = Table(title_justify="left")
    files.add_column("file")
    for heading in ("MB", "pieces"):
        files.add_column(heading, justify="right")
    files.add_column("digest" if found.verified else "size")
    for state in found.files:
        size = f"{state.bytes / _MEGABYTE:,.2f}"
        files.add_row(state.name, size, str(state.pieces), state.problem or "as written")
    console.print(files)


def _precision(manifest: Manifest) -> str:
    return "bf16 parameters beside fp32 masters" if manifest.bf16_parameters else "fp32 parameters"


def _group_table(manifest: Manifest) -> Table:
    table = Table(title_justify="left")
    table.add_column("parameter group")
    for heading in ("learning rate", "weight decay", "tensors"):
        table.add_column(heading, justify="right")
    for name, group in manifest.groups.items():
        table.add_row(name, f"{group.learning_rate:.3g}", f"{group.weight_decay:.3g}", str(group.tensors))
    return table
