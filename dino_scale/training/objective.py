"""The module that DeepSpeed drives: a microbatch goes in, its share of the global batch's loss comes out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import Dino
from dino_scale.model.preprocess import normalise
from dino_scale.precision import autocast
from dino_scale.structures import Batch


class Objective(nn.Module):
    """normalise -> detector (under autocast unless precision is fp32) -> loss in float32."""

    def __init__(
        self,
        model: Dino,
        criterion: Criterion,
        *,
        precision: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.precision = precision
        self.mean = mean
        self.std = std

    def forward(self, batch: Batch, box_count: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, detached parts by name). `box_count`: boxes of the whole global batch, at least 1."""
        images, padding_mask = normalise(batch, self.mean, self.std)
        with autocast(images.device, self.precision):
            outputs = self.model(images, padding_mask, batch.targets, generator)
        losses = self.criterion(outputs, batch.targets, box_count)
        return losses["total"], {name: value.detach() for name, value in losses.items()}
