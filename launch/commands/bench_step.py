"""`dino-scale bench step`: the operators that a training step spends its time in, as a CSV file."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from dino_scale.config.schema import ModelConfig
from dino_scale.errors import UserError
from dino_scale.training.step_profile import StepProfile, profile_step
from launch.commands.output import new_table, require_new_file, today_here

_COLUMNS = ("date", "machine", "threads", "step", "way", "step_ms", "operator", "calls", "own_ms", "share")


def run(arguments: argparse.Namespace) -> None:
    require_new_file(arguments.out)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench step: --device cuda needs a CUDA device, and torch sees none; use --device cpu")
    console = Console(highlight=False, soft_wrap=True)
    what = f"DINO 4-scale R50, {arguments.images} x {arguments.size}x{arguments.size}"
    with new_table(arguments.out, _COLUMNS) as add:
        for way in ("usual", "ours"):
            found = _profile(way, ModelConfig(attention="reference" if way == "usual" else "auto"), arguments)
            console.print(f"{what}, {way} way: {found.milliseconds:.0f} ms")
            for row in _rows(found, what, arguments.device):
                add(row)
                console.print(f"  {row[-1]:>6}  {row[-2]:>10} ms  {row[-3]:>6} calls  {row[-4]}")


def _profile(way: str, model: ModelConfig, arguments: argparse.Namespace) -> StepProfile:
    size = (arguments.size, arguments.size)
    return profile_step(way, model, torch.device(arguments.device), size, arguments.images, arguments.turns)


def _rows(found: StepProfile, what: str, device: str) -> list[tuple[object, ...]]:
    start = (*today_here(device), torch.get_num_threads(), what, found.way, f"{found.milliseconds:.1f}")
    return [
        (*start, operator.name, operator.calls, f"{operator.milliseconds:.2f}", f"{operator.share:.3f}")
        for operator in found.operators
    ]
