"""`dino-scale bench loader`: what the data path costs on this machine, as a CSV file."""

from __future__ import annotations

import argparse
import itertools

from rich.console import Console

from data_pipeline.bench import Row, measure_loader
from dino_scale.errors import UserError
from launch.commands.output import new_table, require_new_file
from launch.provenance import commit, machine, today

_COLUMNS = ("date", "commit", "machine", "what", "way", "value", "unit", "ratio", "against")


def run(arguments: argparse.Namespace) -> None:
    require_new_file(arguments.out)
    if arguments.images < 1:
        raise UserError(f"bench loader: --images is {arguments.images}: expected 1 or more")
    console = Console(highlight=False, soft_wrap=True)
    rows = measure_loader(arguments.shards, arguments.images, lambda text: console.print(f"{text} ..."))
    source = (today(), commit(), machine("cpu"))
    first = next(rows)  # before the file is made: the folder of shards may be wrong
    with new_table(arguments.out, _COLUMNS) as add:
        for row in itertools.chain([first], rows):
            console.print(line(row), markup=False)
            add((*source, row.what, row.way, f"{row.value:.4g}", row.unit, _ratio(row), row.against))


def line(row: Row) -> str:
    figure = f"{row.what}; {row.way}: {row.value:.4g} {row.unit}"
    return (
        figure
        if row.ratio is None or row.way == row.against
        else f"{figure}, {row.ratio:.2f} times cheaper than {row.against}"
    )


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.3f}"
