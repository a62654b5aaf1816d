"""`dino-scale bench kernels`: times and ratios of the kernels as a CSV file."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
from pathlib import Path

import torch
from rich.console import Console

from dino_scale.errors import UserError
from kernels.bench import Row, measure, missing_peers

_COLUMNS = ("date", "machine", "threads", "what", "dtype", "passes", "implementation", "milliseconds", "ratio")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"'{arguments.out}' exists: give a new file with --out")
    console = Console(highlight=False, soft_wrap=True)
    if arguments.device == "cuda":
        for line in missing_peers():
            console.print(line)
    rows = []
    try:
        for row in measure(arguments.device, arguments.turns):
            console.print(f"{row.what}, {row.dtype}, {row.passes}: {_figures(row)}")
            rows.append(row)
    except ValueError as error:
        raise UserError(str(error)) from error
    _write(arguments.out, rows, arguments.device)


def _figures(row: Row) -> str:
    return f"{row.implementation} {row.milliseconds:.2f} ms, {row.ratio:.2f} times as fast as the usual way"


def _write(path: Path, rows: list[Row], device: str) -> None:
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in rows:
            figures = (f"{row.milliseconds:.4f}", f"{row.ratio:.3f}")
            writer.writerow(
                (now, machine, torch.get_num_threads(), row.what, row.dtype, row.passes, row.implementation, *figures)
            )
