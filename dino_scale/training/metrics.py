"""The training log: one JSON object per logged step, in R/STAGE/metrics.jsonl."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


class MetricsLog:
    """Appends lines; a resumed stage first drops the lines of steps it will do again."""

    def __init__(self, path: Path, resumed_step: int, enabled: bool = True) -> None:
        """`resumed_step`: optimizer steps that are already done; later lines are removed. One rank is `enabled`."""
        self.path = path
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep_until(path, resumed_step)

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps from a file of JSON objects that have a "step"; the rest stays as it is."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the last line of a killed run may be cut off
            continue
        if line["step"] <= step:
            kept.append(text)
    replacement = path.with_suffix(".partial")
    replacement.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    os.replace(replacement, path)


class Stopwatch:
    """Splits wall time into waiting for data and everything else."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0

    def add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def wait_share(self) -> float:
        return self._waited / max(self.seconds(), 1e-9)


def memory_megabytes() -> float:
    """Peak memory of this process: device memory where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
