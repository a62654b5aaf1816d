"""`dino-scale bench kernels`: times and ratios of the kernels as a CSV file."""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import platform

import torch
from rich.console import Console

from dino_scale.errors import UserError
from kernels.bench import Row, measure

_COLUMNS = ("date", "machine", "threads", "what", "dtype", "passes", "implementation", "milliseconds", "ratio")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"'{arguments.out}' exists: give a new file with --out")
    console = Console(highlight=False, soft_wrap=True)
    try:
        rows = measure(arguments.device, arguments.turns)
    except ValueError as error:
        raise UserError(str(error)) from error
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in rows:
            console.print(f"{row.what}, {row.dtype}, {row.passes}: {_figures(row)}")
            writer.writerow(_fields(row, arguments.device))
            file.flush()


def _figures(row: Row) -> str:
    if math.isnan(row.milliseconds):
        return row.implementation
    return f"{row.implementation} {row.milliseconds:.2f} ms, {row.ratio:.2f} times as fast as the usual way"


def _fields(row: Row, device: str) -> tuple[object, ...]:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    threads, figures = torch.get_num_threads(), _numbers(row)
    return today, machine, threads, row.what, row.dtype, row.passes, row.implementation, *figures


def _numbers(row: Row) -> tuple[str, str]:
    """Empty fields for what was not measured."""
    if math.isnan(row.milliseconds):
        return "", ""
    return f"{row.milliseconds:.4f}", f"{row.ratio:.3f}"
