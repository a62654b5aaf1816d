"""`dino-scale bench kernels`: times and ratios of the kernels as a CSV file."""

from __future__ import annotations

import argparse
import math

import torch
from rich.console import Console

from dino_scale.errors import UserError
from kernels.bench import Row, measure
from launch.commands.output import new_table, require_new_file, today_here

_COLUMNS = ("date", "machine", "threads", "what", "dtype", "passes", "implementation", "milliseconds", "ratio")


def run(arguments: argparse.Namespace) -> None:
    require_new_file(arguments.out)
    console = Console(highlight=False, soft_wrap=True)
    try:
        rows = measure(arguments.device, arguments.turns)
    except ValueError as error:
        raise UserError(str(error)) from error
    with new_table(arguments.out, _COLUMNS) as add:
        for row in rows:
            console.print(f"{row.what}, {row.dtype}, {row.passes}: {_figures(row)}")
            add(_fields(row, arguments.device))


def _figures(row: Row) -> str:
    if math.isnan(row.milliseconds):
        return row.implementation
    return f"{row.implementation} {row.milliseconds:.2f} ms, {row.ratio:.2f} times as fast as the usual way"


def _fields(row: Row, device: str) -> tuple[object, ...]:
    threads, figures = torch.get_num_threads(), _numbers(row)
    return *today_here(device), threads, row.what, row.dtype, row.passes, row.implementation, *figures


def _numbers(row: Row) -> tuple[str, str]:
    """Empty fields for what was not measured."""
    if math.isnan(row.milliseconds):
        return "", ""
    return f"{row.milliseconds:.4f}", f"{row.ratio:.3f}"
