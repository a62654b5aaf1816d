"""The tiny detector under DeepSpeed, with microbatches with and without boxes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_scale.config.schema import DenoisingConfig, LossConfig, OptimizerConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import Dino, build_model
from dino_scale.structures import Targets
from dino_scale.training import distributed
from dino_scale.training.optimizer import parameter_groups
from dino_scale.training.zero import ZeroEngine
from tests.support.tiny_detector import CLASSES, generator, images, targets, tiny

# Boxes of the two images of each of the two microbatches, step by step.
COUNTS = [((2, 1), (0, 3)), ((0, 0), (1, 2)), ((0, 0), (0, 0)), ((4, 0), (1, 1)), ((1, 1), (2, 2))]


class DetectorLoss(nn.Module):
    def __init__(self, model: Dino) -> None:
        super().__init__()
        self.model = model
        self.criterion = Criterion(LossConfig())

    def forward(self, pixels: Tensor, padding: Tensor, boxes: Targets, count: float, seed: int) -> tuple[Tensor, None]:
        outputs = self.model(pixels, padding, boxes, generator(seed))
        return self.criterion(outputs, boxes, count)["total"], None


def train_detector(stage: int) -> tuple[list[float], dict[str, Tensor]]:
    """Global loss of each step, and all trained parameters at the end."""
    torch.manual_seed(0)
    model = build_model(tiny(denoising=DenoisingConfig(queries=4)), CLASSES).train()
    world, rank = distributed.world_size(), distributed.rank()
    parts = 2 // world
    engine = ZeroEngine(
        DetectorLoss(model),
        model,
        parameter_groups(model, OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-3)),
        stage=stage,
        microbatch=2,
        accumulation=parts,
        clip_norm=0.1,
        betas=(0.9, 0.999),
        epsilon=1e-8,
    )
    losses = []
    for step, counts in enumerate(COUNTS):
        total = torch.zeros(())
        boxes_of_step = float(max(sum(map(sum, counts)), 1))
        for number in range(rank * parts, (rank + 1) * parts):
            seed = 10 * step + number
            pixels, padding = images(2, seed=seed)
            loss, _ = engine(pixels, padding, targets(*counts[number], seed=seed), boxes_of_step, seed)
            engine.backward(loss * parts * world)
            engine.step()
            total += loss.detach()
        losses.append(float(distributed.sum_over_ranks(total)))
    return losses, engine.gather("fp32")
