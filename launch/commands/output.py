"""Files that commands write for the user."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dino_scale.errors import UserError
from launch.provenance import machine, today


def require_new_file(path: Path) -> None:
    """UserError where --out exists: nobody's results are overwritten."""
    if path.exists():
        raise UserError(f"--out is {path}, which exists: give a new file with --out")


@contextmanager
def new_table(path: Path, columns: Sequence[str]) -> Iterator[Callable[[Iterable[object]], None]]:
    """A new CSV file with a heading; call the result with each row, which can be read in the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)

        def add(row: Iterable[object]) -> None:
            writer.writerow(row)
            file.flush()

        add(columns)
        yield add


def today_here(device: str = "cpu") -> tuple[str, str]:
    """The date, and the machine that the figures are of."""
    return today(), machine(device)
