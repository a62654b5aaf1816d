"""From the command to the first optimizer step, and where the time goes: the real command, seen from outside.

The lines that `train` prints mark the borders between the phases; the first line of metrics.jsonl is the first step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_scale.errors import WorkerLostError
from launch.ladder import FOLDER, STAGE

ENGINES = ("local", "torchrun", "ray")
CHAIN = FOLDER / "dino.yaml"
# (what the time before the line is spent on, what the line holds); a line that an engine does not print is left out.
_BORDERS = (
    ("imports, configuration, checks", "run folder: "),
    ("Ray: start, placement, worker imports", "worker(s) on "),
    ("stage: data, model", "parameter group"),
)
_LAST = "DeepSpeed, loader, first step"
_LONGEST_SECONDS = 600.0


@dataclass(frozen=True)
class Phase:
    """A part of one start. what: a phase, or "all"."""

    engine: str
    turn: int
    what: str
    seconds: float


def measure_start(engine: str, workers: int, turn: int, data: Path, run_dir: Path) -> list[Phase]:
    """Train one step in a new process. workers: 1 for the engine local. data: folder with train and validation shards.

    WorkerLostError, with the command's last lines, where it fails.
    """
    begin = time.time()
    process = subprocess.Popen(
        _command(engine, workers, data, run_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = [(time.time(), line.rstrip()) for line in process.stdout]
    if process.wait(timeout=_LONGEST_SECONDS) != 0:
        tail = " | ".join(line for _, line in lines[-3:])
        raise WorkerLostError(f"the start under {engine} ended with code {process.returncode}: {tail}")
    step = _time_of_first_step(run_dir / STAGE / "metrics.jsonl")
    return [Phase(engine, turn, what, seconds) for what, seconds in _phases(begin, lines, step)]


def _command(engine: str, workers: int, data: Path, run_dir: Path) -> list[str]:
    python = [sys.executable, "-m"]
    if engine == "torchrun":
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"]
    stage = f"stages.{STAGE}"
    settings = [
        f"launch.engine={engine}",
        f"launch.workers={workers if engine == 'ray' else 1}",
        "launch.threads=1",
        f"{stage}.data.train={data / 'train'}",
        f"{stage}.data.validation=",
        f"{stage}.schedule.steps=1",
        f"{stage}.schedule.warmup_steps=0",
        f"{stage}.log_every_steps=1",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    return [*python, "launch", "train", str(CHAIN), "--run-dir", str(run_dir), *options]


def _phases(begin: float, lines: Sequence[tuple[float, str]], step: float) -> Iterator[tuple[str, float]]:
    last = begin
    for what, mark in _BORDERS:
        moment = next((moment for moment, line in lines if mark in line), None)
        if moment is not None:
            yield what, moment - last
            last = moment
    yield _LAST, step - last
    yield "all", step - begin


def _time_of_first_step(metrics: Path) -> float:
    with metrics.open(encoding="utf-8") as file:
        return float(json.loads(file.readline())["time"])


def machine() -> str:
    return f"{os.uname().machine}, {os.cpu_count()} CPUs"
