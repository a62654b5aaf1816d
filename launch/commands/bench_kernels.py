"""`dino-scale bench kernels`: times and ratios of the kernels, or what the compiler makes of them, as a CSV file."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from rich.console import Console

from dino_scale.errors import UserError
from kernels.bench import measure
from kernels.bench_conclusions import conclusions
from kernels.bench_timing import Row
from launch.provenance import commit, machine, today

_SOURCE = ("date", "commit", "machine", "threads")
_TIMES = ("what", "dtype", "passes", "implementation", "milliseconds", "device_milliseconds", "ratio")
_COMPILED = ("triton", "kernel", "capability", "dtype", "shape", "registers", "spill_bytes", "barriers", "warps_per_sm")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"'{arguments.out}' exists: give a new file with --out")
    console = Console(highlight=False, soft_wrap=True)
    if arguments.compiled:
        _write(arguments.out, (*_SOURCE, *_COMPILED), _compiled(console))
        return
    try:
        rows = measure(arguments.device, arguments.turns, arguments.only)
    except ValueError as error:
        raise UserError(str(error)) from error
    measured: list[Row] = []
    _write(arguments.out, (*_SOURCE, *_TIMES), _timed(rows, arguments.device, console, measured))
    for line in conclusions(measured) if arguments.device == "cuda" else []:
        console.print(line, markup=False)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Row by row, so that what was measured stays when the rest fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(row)
            file.flush()


def _timed(rows: Iterable[Row], device: str, console: Console, measured: list[Row]) -> Iterator[Sequence[object]]:
    source = (today(), commit(), machine(device), torch.get_num_threads())
    for row in rows:
        measured.append(row)
        console.print(f"{row.what}, {row.dtype}, {row.passes}: {_figures(row)}", markup=False)
        yield *source, row.what, row.dtype, row.passes, row.implementation, *_numbers(row)


def _figures(row: Row) -> str:
    if row.times is None:
        return row.implementation
    milliseconds, on_device, ratio = _numbers(row)
    found = f"{row.implementation} {milliseconds} ms"
    found += f", {on_device} ms each of many queued" if on_device else ""
    return found + (f", {ratio} times as fast as the usual way" if ratio else "")


def _numbers(row: Row) -> tuple[str, str, str]:
    """Milliseconds of one call and of one among queued ones, and the ratio; empty fields for what was not measured."""
    if row.times is None:
        return "", "", ""
    numbers = (row.times.wall * 1e3, row.times.queued * 1e3)
    milliseconds, on_device = ("" if math.isnan(number) else f"{number:.4f}" for number in numbers)
    return milliseconds, on_device, "" if math.isnan(row.ratio()) else f"{row.ratio():.3f}"


def _compiled(console: Console) -> Iterator[Sequence[object]]:
    try:
        from kernels.bench_compiled import measure_compiled
    except ImportError as error:
        raise UserError(f"bench kernels: --compiled needs triton ({error}); pip install triton") from error
    source = (today(), commit(), machine("cpu"), torch.get_num_threads())
    for row in measure_compiled():
        console.print(
            f"{row.kernel}, {row.dtype}, for {row.capability / 10}: {row.registers} registers, "
            f"{row.spill_bytes} bytes spilled, {row.warps_per_sm} warps per multiprocessor"
        )
        yield *source, *astuple(row)
