"""Matching costs on the GPU: one program per target and layer computes its row of costs and the cheapest query.

A target is compared with the queries of its own image only, so the rows are ragged over images: nothing is padded and
nothing is computed twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.matching.reference import AREA_EPSILON, LOG_EPSILON


class Costs(NamedTuple):
    """matrix (Lyr, T, N) float32, and the minimum of every row, (Lyr, T) float32, with its column, (Lyr, T) int32."""

    matrix: Tensor
    minimum: Tensor
    cheapest: Tensor


def matching_costs(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    image: Tensor,
    *,
    class_cost: float,
    box_cost: float,
    giou_cost: float,
    alpha: float,
    broken_cost: float,
) -> Costs:
    """Cost of every target with every query of its image, lower-case arguments as in `match`; image: (T,) int32."""
    layers, images, queries, classes = logits.shape
    targets = labels.shape[0]
    costs = Costs(
        torch.empty((layers, targets, queries), dtype=torch.float32, device=logits.device),
        torch.empty((layers, targets), dtype=torch.float32, device=logits.device),
        torch.empty((layers, targets), dtype=torch.int32, device=logits.device),
    )
    matching_cost_kernel[(targets, layers)](
        *(tensor.contiguous() for tensor in (logits, boxes, labels, target_boxes, image)),
        *costs,
        images,
        queries,
        classes,
        targets,
        float(class_cost),
        float(box_cost),
        float(giou_cost),
        float(alpha),
        float(broken_cost),
        LOG_EPSILON=LOG_EPSILON,
        AREA_EPSILON=AREA_EPSILON,
        BLOCK=triton.next_power_of_2(queries),
        num_warps=4,
    )
    return costs


@triton.jit
def _corners(boxes, box, known):
    """left, top, right, bottom, and the four numbers as stored: cx, cy, w, h."""
    x = tl.load(boxes + box * 4, mask=known, other=0.5).to(tl.float32)
    y = tl.load(boxes + box * 4 + 1, mask=known, other=0.5).to(tl.float32)
    width = tl.load(boxes + box * 4 + 2, mask=known, other=0.5).to(tl.float32)
    height = tl.load(boxes + box * 4 + 3, mask=known, other=0.5).to(tl.float32)
    half_width, half_height = width * 0.5, height * 0.5
    return x - half_width, y - half_height, x + half_width, y + half_height, x, y, width, height


@triton.jit(do_not_specialize=["images", "queries", "classes", "targets"])
def matching_cost_kernel(
    logits,
    boxes,
    labels,
    target_boxes,
    image,
    costs,
    minimum,
    cheapest,
    images,
    queries,
    classes,
    targets,
    class_cost,
    box_cost,
    giou_cost,
    alpha,
    broken_cost,
    LOG_EPSILON: tl.constexpr,
    AREA_EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.arange(0, BLOCK)
    known = number < queries
    query = (layer * images + tl.load(image + target)) * queries + number
    logit = tl.load(logits + query * classes + tl.load(labels + target), mask=known, other=0.0).to(tl.float32)
    probability = 1.0 / (1.0 + tl.exp(-logit))
    absent = 1.0 - probability
    positive = -alpha * absent * absent * tl.log(probability + LOG_EPSILON)
    negative = -(1.0 - alpha) * probability * probability * tl.log(absent + LOG_EPSILON)
    left, top, right, bottom, x, y, width, height = _corners(boxes, query, known)
    left_t, top_t, right_t, bottom_t, x_t, y_t, width_t, height_t = _corners(target_boxes, target, True)
    distance = tl.abs(x - x_t) + tl.abs(y - y_t) + tl.abs(width - width_t) + tl.abs(height - height_t)
    inside_width = tl.maximum(tl.minimum(right, right_t) - tl.maximum(left, left_t), 0.0)
    inside_height = tl.maximum(tl.minimum(bottom, bottom_t) - tl.maximum(top, top_t), 0.0)
    hull_width = tl.maximum(tl.maximum(right, right_t) - tl.minimum(left, left_t), 0.0)
    hull_height = tl.maximum(tl.maximum(bottom, bottom_t) - tl.minimum(top, top_t), 0.0)
    shared, hull = inside_width * inside_height, hull_width * hull_height
    union = (right - left) * (bottom - top) + (right_t - left_t) * (bottom_t - top_t) - shared
    overlap = shared / (union + AREA_EPSILON) - (hull - union) / (hull + AREA_EPSILON)
    cost = box_cost * distance + class_cost * (positive - negative) - giou_cost * overlap
    # NaN compares false. The maxima and minima above may have dropped a NaN, the distance has not.
    cost = tl.where(tl.abs(cost) < float("inf"), cost, broken_cost)
    row = layer * targets + target
    tl.store(costs + row * queries + number, cost, mask=known)
    lowest, place = tl.min(tl.where(known, cost, float("inf")), 0, return_indices=True)
    tl.store(minimum + row, lowest)
    tl.store(cheapest + row, place)
