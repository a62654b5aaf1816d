"""`dino-scale bench startup`: seconds from the command to the first step, by engine and phase, as a CSV file."""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console

from dino_scale.errors import UserError
from launch.commands.output import require_new_file
from launch.ladder import Plan, draw_data
from launch.startup import Phase, machine, measure_start

_IMAGES = 16  # one global batch


def run(options: argparse.Namespace) -> None:
    if min(options.workers, options.repeat) < 1:
        raise UserError("bench startup: --workers and --repeat are at least 1")
    require_new_file(options.out)
    console = Console(highlight=False, soft_wrap=True)
    found: list[Phase] = []
    with tempfile.TemporaryDirectory(prefix="dino-scale-startup-") as folder:
        data = Path(folder) / "data"
        draw_data(data, Plan(1, _IMAGES, 1, (0,), 1))
        for turn in range(1, options.repeat + 1):
            for engine in options.engines:
                workers = 1 if engine == "local" else options.workers
                found += measure_start(engine, workers, turn, data, Path(folder) / f"{engine}{turn}")
                console.print(f"{engine}, start {turn}: {found[-1].seconds:.1f} s")
    write_csv(options.out, found)
    for engine in options.engines:
        for what, seconds in medians(found, engine):
            console.print(f"{engine}: {what}: {seconds:.1f} s")


def medians(found: list[Phase], engine: str) -> list[tuple[str, float]]:
    """(phase, median seconds over the starts), in the order of the phases."""
    own = [phase for phase in found if phase.engine == engine]
    names = dict.fromkeys(phase.what for phase in own)
    return [(name, median(phase.seconds for phase in own if phase.what == name)) for name in names]


def write_csv(path: Path, found: list[Phase]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("date", "machine", "engine", "start", "phase", "seconds"))
        for phase in found:
            row = (phase.engine, phase.turn, phase.what, f"{phase.seconds:.2f}")
            writer.writerow((time.strftime("%Y-%m-%d"), machine(), *row))
