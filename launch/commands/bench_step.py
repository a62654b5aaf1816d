"""`dino-scale bench step`: the operators that a training step spends its time in, as a CSV file."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform

import torch
from rich.console import Console

from dino_scale.config.schema import ModelConfig
from dino_scale.errors import UserError
from dino_scale.training.step_profile import StepProfile, profile_step

_COLUMNS = ("date", "machine", "threads", "step", "way", "step_ms", "operator", "calls", "own_ms", "share")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists():
        raise UserError(f"'{arguments.out}' exists: give a new file with --out")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench step: --device cuda needs a CUDA device, and torch sees none; use --device cpu")
    console = Console(highlight=False, soft_wrap=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    what = f"DINO 4-scale R50, {arguments.images} x {arguments.size}x{arguments.size}"
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for way in ("usual", "ours"):
            found = _profile(way, ModelConfig(attention="reference" if way == "usual" else "auto"), arguments)
            console.print(f"{what}, {way} way: {found.milliseconds:.0f} ms")
            for row in _rows(found, what, arguments.device):
                writer.writerow(row)
                console.print(f"  {row[-1]:>6}  {row[-2]:>10} ms  {row[-3]:>6} calls  {row[-4]}")
            file.flush()


def _profile(way: str, model: ModelConfig, arguments: argparse.Namespace) -> StepProfile:
    size = (arguments.size, arguments.size)
    return profile_step(way, model, torch.device(arguments.device), size, arguments.images, arguments.turns)


def _rows(found: StepProfile, what: str, device: str) -> list[tuple[object, ...]]:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    start = (today, machine, torch.get_num_threads(), what, found.way, f"{found.milliseconds:.1f}")
    return [
        (*start, operator.name, operator.calls, f"{operator.milliseconds:.2f}", f"{operator.share:.3f}")
        for operator in found.operators
    ]
