"""The matching of DETR (Carion et al., 2020, section 3.1) with the costs of Deformable DETR, one problem at a time.

Slow and simple on purpose: what `match` is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

GAMMA = 2.0
LOG_EPSILON = 1e-8
AREA_EPSILON = 1e-6


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    *,
    class_cost: float,
    box_cost: float,
    giou_cost: float,
    alpha: float,
) -> Tensor:
    """Cost (N, G) of giving each of G targets to each of N queries of one image and one layer.

    logits (N, C), boxes (N, 4), labels (G,) int64, target_boxes (G, 4); boxes as cx, cy, w, h.
    class_cost * focal + box_cost * L1 + giou_cost * (-GIoU); focal is the loss of a positive minus that of a negative.
    """
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** GAMMA * -(probability + LOG_EPSILON).log()
    negative = (1 - alpha) * probability**GAMMA * -(1 - probability + LOG_EPSILON).log()
    focal = (positive - negative)[:, labels]
    distance = torch.cdist(boxes, target_boxes, p=1)
    overlap = generalized_iou(_corners(boxes)[:, None], _corners(target_boxes)[None])
    return box_cost * distance + class_cost * focal - giou_cost * overlap


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of boxes (..., 4) as x1, y1, x2, y2 that broadcast against each other."""
    inside = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    hull = (torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])).clamp(0)
    intersection, hull_area = inside.prod(-1), hull.prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - intersection
    return intersection / (union + AREA_EPSILON) - (hull_area - union) / (hull_area + AREA_EPSILON)


def match_reference(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: Sequence[int],
    *,
    class_cost: float,
    box_cost: float,
    giou_cost: float,
    alpha: float,
) -> Tensor:
    """The same arguments and result as `match`; finite costs only."""
    result = torch.full((logits.shape[0], labels.shape[0]), -1, dtype=torch.int64)
    for layer in range(logits.shape[0]):
        stop = 0
        for image, count in enumerate(counts):
            start, stop = stop, stop + count
            cost = matching_cost(
                logits[layer, image],
                boxes[layer, image],
                labels[start:stop],
                target_boxes[start:stop],
                class_cost=class_cost,
                box_cost=box_cost,
                giou_cost=giou_cost,
                alpha=alpha,
            )
            queries, targets = linear_sum_assignment(cost.detach().cpu().numpy())
            result[layer, start + torch.from_numpy(targets)] = torch.from_numpy(queries)
    return result.to(logits.device)


def _corners(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)
