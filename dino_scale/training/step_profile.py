"""Where the time of one training step goes: the detector with the usual operators, and with those of `kernels`.

One process, no DeepSpeed: forward, loss, backward and an AdamW update of DINO 4-scale with ResNet-50 and random weights
on random pixels, whose cost does not depend on what they show.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dino_scale.config.schema import LossConfig, ModelConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.loss.matcher import match_layers
from dino_scale.model.dino import build_model
from dino_scale.structures import Batch, Targets
from dino_scale.training.objective import Objective
from kernels.bench_official import match_whole_batch

CLASSES, BOXES = 91, 20


@dataclass(frozen=True)
class Operator:
    """Own time in milliseconds of one step, without what it calls; share of the sum over all operators."""

    name: str
    calls: int
    milliseconds: float
    share: float


@dataclass(frozen=True)
class StepProfile:
    """way: "usual" or "ours". milliseconds: of a whole step without the profiler, the least of the turns."""

    way: str
    milliseconds: float
    operators: tuple[Operator, ...]


def profile_step(
    way: str,
    model: ModelConfig,
    device: torch.device,
    size: tuple[int, int],
    images: int,
    turns: int,
    operators: int = 15,
) -> StepProfile:
    """One way: "usual" has grid_sample per level and the whole-batch matcher, "ours" what the detector has."""
    step = _step(way, model, device, size, images)
    step()
    least = min(_seconds(step, device) for _ in range(turns))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        _wait(device)
    return StepProfile(way, least * 1e3, _most_expensive(profiler, device, operators))


def match_usually(logits: Tensor, boxes: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """The arguments and result of `match_layers`, by DETR's matcher: whole batch against whole batch, then scipy."""
    weights = {
        "class_cost": config.match_class_cost,
        "box_cost": config.match_box_cost,
        "giou_cost": config.match_giou_cost,
        "alpha": config.focal_alpha,
    }
    result = torch.full((len(logits), len(targets.labels)), -1)
    with torch.no_grad():
        pairs = match_whole_batch(
            logits.detach().float(), boxes.detach().float(), targets.labels, targets.boxes, targets.counts, **weights
        )
    for layer, images in enumerate(pairs):
        start = 0
        for count, (queries, matched) in zip(targets.counts, images, strict=True):
            result[layer, start + torch.from_numpy(matched)] = torch.from_numpy(queries)
            start += count
    return result.to(logits.device)


def _step(way: str, model: ModelConfig, device: torch.device, size: tuple[int, int], images: int) -> Callable[[], None]:
    torch.manual_seed(0)
    detector = build_model(model, CLASSES, pretrained=False).to(device).train()
    criterion = Criterion(LossConfig(), match_usually if way == "usual" else match_layers)
    precision = "bf16" if device.type == "cuda" else "fp32"
    objective = Objective(detector, criterion, precision=precision, mean=(0.5,) * 3, std=(0.25,) * 3)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    batch = _batch(size, images)

    def step() -> None:
        loss, _ = objective(batch.to(device), float(images * BOXES), torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batch(size: tuple[int, int], images: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    sides = torch.rand(images * BOXES, 2, generator=draw) * 0.3 + 0.05
    centres = sides / 2 + (1 - sides) * torch.rand(images * BOXES, 2, generator=draw)
    labels = torch.randint(CLASSES, (images * BOXES,), generator=draw)
    pixels = torch.randint(256, (images, 3, *size), dtype=torch.uint8, generator=draw)
    numbers = tuple(range(images))
    targets = Targets(labels, torch.cat([centres, sides], 1), (BOXES,) * images)
    return Batch(pixels, (size,) * images, (size,) * images, numbers, numbers, targets)


def _most_expensive(profiler: profile, device: torch.device, number: int) -> tuple[Operator, ...]:
    on_gpu = device.type == "cuda"
    events = profiler.key_averages()
    own = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(own.values())
    first = sorted(own, key=lambda key: own[key], reverse=True)[:number]
    return tuple(Operator(key, calls[key], own[key] / 1e3, own[key] / total) for key in first)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
