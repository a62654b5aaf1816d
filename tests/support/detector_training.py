"""The tiny detector under DeepSpeed, with microbatches with and without boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dino_scale.config.schema import DenoisingConfig, LossConfig, OptimizerConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import Dino, build_model
from dino_scale.precision import BF16_PARAMETERS, autocast
from dino_scale.structures import Targets
from dino_scale.training import distributed
from dino_scale.training.ema import WeightAverage
from dino_scale.training.optimizer import parameter_groups
from dino_scale.training.zero import StepOutcome, ZeroEngine
from tests.support.tiny_detector import CLASSES, generator, images, targets, tiny

DECAY = 0.75  # of the weight average; exact in binary
# Boxes of the two images of each of the two microbatches, step by step.
COUNTS = [((2, 1), (0, 3)), ((0, 0), (1, 2)), ((0, 0), (0, 0)), ((4, 0), (1, 1)), ((1, 1), (2, 2))]


class DetectorLoss(nn.Module):
    def __init__(self, model: Dino, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.criterion = Criterion(LossConfig())

    def forward(self, pixels: Tensor, padding: Tensor, boxes: Targets, count: float, seed: int) -> tuple[Tensor, None]:
        with autocast(pixels.device, self.precision):
            outputs = self.model(pixels, padding, boxes, generator(seed))
        return self.criterion(outputs, boxes, count)["total"], None


def train_detector(*runs: tuple[int, str]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """For each (stage, precision) the global loss of each step, and all trained parameters at the end."""
    results = []
    for stage, precision in runs:
        engine, parts = build(stage, precision)
        losses = [train_step(engine, parts, step)[0] for step in range(len(COUNTS))]
        results.append((losses, engine.gather("fp32")))
        engine.destroy()
    return results


def average_and_poison(stage: int) -> dict[str, Any]:
    """Weights and average after a first step, then a step in which one microbatch of one rank has a NaN pixel."""
    engine, parts = build(stage)
    average = WeightAverage(engine, DECAY)
    before = engine.gather("fp32")
    _, first = train_step(engine, parts, 0)
    average.update()
    after = {kind: engine.gather(kind) for kind in engine.kinds}
    loss, poisoned = train_step(engine, parts, 3, poison=1)
    state = {kind: engine.gather(kind) for kind in engine.kinds}
    applied = (first.applied, poisoned.applied)
    return {"before": before, "after": after, "state": state, "applied": applied, "loss": loss}


def build(stage: int, precision: str = "fp32", **changes: Any) -> tuple[ZeroEngine, int]:
    """The engine, one group per block of the backbone, and the microbatches that are this rank's in every step."""
    torch.manual_seed(0)
    model = build_model(tiny(denoising=DenoisingConfig(queries=4), attention="auto", **changes), CLASSES).train()
    parts = 2 // distributed.world_size()
    rates = OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-3, backbone_layer_decay=0.9)
    engine = ZeroEngine(
        DetectorLoss(model, precision),
        model,
        parameter_groups(model, rates),
        stage=stage,
        microbatch=2,
        accumulation=parts,
        clip_norm=0.1,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        bf16_parameters=precision == BF16_PARAMETERS,
    )
    return engine, parts


def train_step(engine: ZeroEngine, parts: int, step: int, poison: int = -1) -> tuple[float, StepOutcome]:
    """Global loss and outcome of one step; `poison`: the microbatch with a pixel that is NaN."""
    counts, rank = COUNTS[step], distributed.rank()
    total, outcome = torch.zeros(()), None
    boxes_of_step = float(max(sum(map(sum, counts)), 1))
    for number in range(rank * parts, (rank + 1) * parts):
        seed = 10 * step + number
        pixels, padding = images(2, seed=seed)
        if number == poison:
            pixels[0, 0, 5, 5] = torch.nan
        loss, _ = engine(pixels, padding, targets(*counts[number], seed=seed), boxes_of_step, seed)
        engine.backward(loss * parts * distributed.world_size())
        outcome = engine.step()
        total += loss.detach()
    assert outcome is not None
    return float(distributed.sum_over_ranks(total)), outcome
