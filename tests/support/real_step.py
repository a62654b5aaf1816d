"""A real step of the small detector without DeepSpeed, and how much memory it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import LossConfig, ModelConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import build_model
from dino_scale.structures import Batch
from dino_scale.training.objective import Objective
from launch.commands.demo import CHAIN
from tests.support.memory_of_engines import batch

CLASSES = 14


def objective_of(model: ModelConfig, precision: str) -> Objective:
    torch.manual_seed(0)
    detector = build_model(model, CLASSES).train()
    return Objective(detector, Criterion(LossConfig()), precision=precision, mean=(0.5,) * 3, std=(0.25,) * 3)


def step(objective: Objective, pixels: Batch) -> None:
    loss, _ = objective(pixels, 80.0, torch.Generator().manual_seed(0))
    loss.backward()


def measured_growth(precision: str, recompute: bool, images: int, size: tuple[int, int]) -> int:
    """Bytes by which this process grows in one step, after a small one that loads and compiles everything."""
    model = load_chain(CHAIN).model
    model = replace(model, backbone=replace(model.backbone, checkpoint_activations=recompute))
    objective = objective_of(model, precision)
    step(objective, batch(images=1, size=(64, 64), boxes=20))
    before = _memory("VmRSS")
    step(objective, batch(images=images, size=(size[0], size[1]), boxes=20))
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """Bytes, from the kernel's own account of this program; getrusage's peak counts the process that started it too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
