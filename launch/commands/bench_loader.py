"""`dino-scale bench loader`: what the data path costs on this machine, as a CSV file."""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import os
import platform
import subprocess
from pathlib import Path

from rich.console import Console

from data_pipeline.bench import Row, measure_loader
from dino_scale.errors import UserError

_COLUMNS = ("date", "machine", "commit", "what", "way", "value", "unit", "ratio", "against")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"'{arguments.out}' exists: give a new file with --out")
    if arguments.images < 1:
        raise UserError(f"bench loader: --images is {arguments.images}: expected 1 or more")
    console = Console(highlight=False, soft_wrap=True)
    rows = measure_loader(arguments.shards, arguments.images, lambda text: console.print(f"{text} ..."))
    today, machine = datetime.datetime.now(datetime.UTC).date().isoformat(), platform.machine()
    start = (today, f"{machine}, {os.cpu_count()} CPUs", commit())
    first = next(rows)  # before the file is made: the folder of shards may be wrong
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in itertools.chain([first], rows):
            console.print(line(row), markup=False)
            writer.writerow((*start, row.what, row.way, f"{row.value:.4g}", row.unit, _ratio(row), row.against))
            file.flush()


def line(row: Row) -> str:
    figure = f"{row.what}; {row.way}: {row.value:.4g} {row.unit}"
    return (
        figure
        if row.ratio is None or row.way == row.against
        else f"{figure}, {row.ratio:.2f} times cheaper than {row.against}"
    )


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.3f}"


def commit() -> str:
    """Of the checkout this runs from, with a + where files differ from it; empty outside of one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
