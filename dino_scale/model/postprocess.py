"""From the last layer's predictions to detections (official PostProcess: no suppression, no score threshold)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_scale.boxes import to_corners
from dino_scale.model.outputs import Outputs
from dino_scale.structures import Detections


def detect(outputs: Outputs, original_sizes: Sequence[tuple[int, int]], detections: int) -> list[Detections]:
    """The best `detections` (query, class) pairs of each image, best first; a query may appear with several classes.

    original_sizes: (height, width) in pixels of each image on disk. Boxes are not clipped to the image.
    """
    probabilities = outputs.logits[-1].float().sigmoid()
    corners = to_corners(outputs.boxes[-1].float())
    return [
        _best(scores, boxes, size, detections)
        for scores, boxes, size in zip(probabilities, corners, original_sizes, strict=True)
    ]


def _best(scores: Tensor, corners: Tensor, size: tuple[int, int], detections: int) -> Detections:
    """scores (Q, C), corners (Q, 4) in [0, 1]."""
    best = scores.flatten().topk(min(detections, scores.numel()))
    query = torch.div(best.indices, scores.shape[1], rounding_mode="floor")
    height, width = size
    pixels = corners.new_tensor([width, height, width, height])
    return Detections(scores=best.values, labels=best.indices % scores.shape[1], boxes=corners[query] * pixels)
