"""`dino-scale bench ladder`: DINO and its ancestors under equal conditions, as a table."""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dino_scale.errors import UserError
from launch.ladder import Plan, Rung, averages, run_ladder
from launch.progress import Progress, number
from launch.run_folder import require_new

_COLUMNS = ("detector", "parameters", "AP", "AP50", "instability", "IS", "seconds")
_FIELDS = ("rung", "seed", "steps", "images", "parameters", "AP", "AP50", "instability", "IS", "by_epoch", "seconds")


def run(options: argparse.Namespace) -> None:
    if min(options.steps, options.images, options.validation, options.workers) < 1 or not options.seeds:
        raise UserError("bench ladder: --steps, --images, --validation and --workers are at least 1, --seeds not empty")
    if options.out is not None and options.out.exists():
        raise UserError(f"{options.out} exists already: choose another --out")
    plan = Plan(options.steps, options.images, options.validation, tuple(options.seeds), options.workers)
    run_dir = Path(os.path.abspath(options.run_dir or Path("runs") / f"ladder-{time.strftime('%Y%m%d-%H%M%S')}"))
    require_new(run_dir)
    rungs: list[Rung] = []
    with Progress() as progress:
        for rung in run_ladder(plan, run_dir, progress):
            rungs.append(rung)
            scores = f"AP {number(rung.metrics['AP'])}, instability {number(rung.share)}"
            progress.message(f"{rung.name}, seed {rung.seed}: {scores}")
            write_csv(options.out or run_dir / "ladder.csv", rungs, plan)
        show(rungs, plan, progress.console)


def show(rungs: Sequence[Rung], plan: Plan, console: Console) -> None:
    """Means over seeds, and what the columns mean."""
    title = f"{plan.steps} steps on {plan.images} pictures, seeds {', '.join(map(str, plan.seeds))}"
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(_COLUMNS):
        table.add_column(heading, justify="right" if position else "left")
    for name, parameters, *values, seconds in averages(rungs):
        table.add_row(name, f"{parameters:,}", *map(number, values), f"{seconds:.0f}")
    console.print(table)
    console.print("instability: share of the boxes of a picture whose matched query differs from one epoch to the next")
    console.print(
        "IS: queries of a picture whose matched box differs (DN-DETR); a selected query is known by its token"
    )


def write_csv(path: Path, rungs: Sequence[Rung], plan: Plan) -> None:
    """One line per rung and seed; by_epoch: the instability from each epoch to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_FIELDS)
        for rung in rungs:
            by_epoch = " ".join(f"{change.share:.4f}" for change in rung.changes)
            scores = [f"{value:.4f}" for value in (rung.metrics["AP"], rung.metrics["AP50"], rung.share, rung.queries)]
            row = [rung.name, rung.seed, plan.steps, plan.images, rung.parameters, *scores, by_epoch]
            writer.writerow([*row, f"{rung.seconds:.1f}"])
