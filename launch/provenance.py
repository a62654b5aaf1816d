"""Where a measurement comes from: the code, the machine, the day. For the files of `bench`."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch


def today() -> str:
    """The date in UTC, YYYY-MM-DD."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit(root: Path | None = None) -> str:
    """Of the checkout that holds this code (or `root`): `git describe`, with "-dirty" where tracked files differ from
    it. "not a checkout" for installed code, whose commit nobody can tell."""
    root = root or Path(__file__).parents[1]
    if not (root / ".git").exists():
        return "not a checkout"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {type(error).__name__}"


def machine(device: str) -> str:
    """The card for "cuda"; for "cpu" the model as the system names it, and how many CPUs this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {len(os.sched_getaffinity(0))} CPUs"


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
