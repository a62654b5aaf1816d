"""Runs of the command line that are killed at a step and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tests.support.trajectory import STAGE, Topology

Victim = Literal["one worker", "all workers", "the driver"]
PATIENCE = 240.0


@dataclass(frozen=True)
class Kill:
    """A SIGKILL once the log shows `step`."""

    step: int
    victim: Victim


def command(verb: str, target: Path, settings: dict[str, object]) -> list[str]:
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "launch", verb, str(target), *overrides]


def settings_of(topology: Topology) -> dict[str, object]:
    return {"launch.workers": topology.workers, f"stages.{STAGE}.zero_stage": topology.zero_stage}


def run_until_killed(arguments: Sequence[str], run: Path, kill: Kill) -> None:
    """Start the command, kill once it has logged the step, wait for its end."""
    begin = time.time()
    driver = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        workers = _wait_for_step(driver, run, kill.step, begin)
        victims = {"one worker": workers[:1], "all workers": workers, "the driver": [driver.pid]}[kill.victim]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        output, _ = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode != 0, f"nothing was killed: {output}"
    if kill.victim != "the driver":
        assert "dino-scale resume" in output, output


def finish(arguments: Sequence[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


def _wait_for_step(driver: subprocess.Popen[str], run: Path, step: int, begin: float) -> list[int]:
    """Until this attempt has logged `step` or a later one; its workers. Lines from before `begin` do not count."""
    deadline = time.monotonic() + PATIENCE
    while not ((line := _last_line(run)) and line["step"] >= step and line["time"] > begin):
        assert driver.poll() is None, f"ended before step {step}: {driver.communicate()[0]}"
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)
    workers = _workers(driver.pid)
    assert workers, "a step without training processes"
    return workers


def _last_line(run: Path) -> dict[str, float] | None:
    """Of the log; None without one. The last line may be half written."""
    path = run / STAGE / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else None


def _workers(driver: int) -> list[int]:
    """Process ids of the training processes under Ray, which names them after the class of the actor."""
    below = psutil.Process(driver).children(recursive=True)
    return [process.pid for process in below if " ".join(process.cmdline()).startswith("ray::WorkerProcess")]
