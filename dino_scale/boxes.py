"""Box arithmetic. Boxes are (..., 4): "centred" is cx, cy, width, height; "corners" is x1, y1, x2, y2."""

from __future__ import annotations

import torch
from torch import Tensor

LOGIT_EPSILON = 1e-3  # official util/misc.py; a box at the border has the logit of 0.001
AREA_EPSILON = 1e-6  # official util/box_ops.py


def to_corners(boxes: Tensor) -> Tensor:
    """Centred boxes (..., 4) to corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def to_centred(corners: Tensor) -> Tensor:
    """Corners (..., 4) to centred boxes."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """log(x / (1 - x)) with x and 1 - x kept at or above LOGIT_EPSILON, so that it is finite on [0, 1]."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=LOGIT_EPSILON) / (1 - x).clamp(min=LOGIT_EPSILON))


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of corners (..., 4) with corners (..., 4), broadcast: (...) in [-1, 1]."""
    intersection = _extent(
        torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    )
    union = _area(first) + _area(second) - intersection
    iou = intersection / (union + AREA_EPSILON)
    hull = _extent(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    return iou - (hull - union) / (hull + AREA_EPSILON)


def _area(corners: Tensor) -> Tensor:
    size = corners[..., 2:] - corners[..., :2]
    return size[..., 0] * size[..., 1]


def _extent(low: Tensor, high: Tensor) -> Tensor:
    size = (high - low).clamp(min=0)
    return size[..., 0] * size[..., 1]
