"""Which query answers for which box: one-to-one assignment for all layers at once (DETR, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_scale.config.schema import LossConfig
from dino_scale.structures import Targets
from kernels.matching import match


def match_layers(logits: Tensor, boxes: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """For every layer and every box, the query of its image matched to it: (Lyr, T) int64.

    logits: (Lyr, B, Q, C). boxes: (Lyr, B, Q, 4) centred. An image with more boxes than queries leaves as many boxes
    without one as it has too many, those that cost least to leave; they have -1. That is rare (crowded Objects365
    images, images with fewer tokens than queries) and no reason to stop a run of days.
    """
    with torch.no_grad():
        return match(
            logits.detach().float(),
            boxes.detach().float(),
            targets.labels,
            targets.boxes,
            targets.counts,
            class_cost=config.match_class_cost,
            box_cost=config.match_box_cost,
            giou_cost=config.match_giou_cost,
            alpha=config.focal_alpha,
        )
