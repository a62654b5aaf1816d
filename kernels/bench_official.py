"""The usual ways that the kernels are compared with: what the public DETR code bases compute, and how much of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels.deform_attn.reference import sampling_locations
from kernels.matching.reference import matching_cost

OFFICIAL_OP = "MultiScaleDeformableAttention"
IMAGES_AT_ONCE = 64


def attention_by_grid_sample(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """One grid_sample per level, all samples stacked, weighted and summed, everything in the dtype of `value`."""
    batch, _, heads, channels = value.shape
    queries, _, levels, points = offsets.shape[1:5]
    weights = logits.softmax(-1).transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    locations = sampling_locations(offsets, reference_points.to(value.dtype), level_shapes)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    maps = value.split([height * width for height, width in level_shapes], 1)
    sampled = []
    for level, (height, width) in enumerate(level_shapes):
        images = maps[level].flatten(2).transpose(1, 2).reshape(batch * heads, channels, height, width)
        sampled.append(F.grid_sample(images, grids[:, :, level], padding_mode="zeros", align_corners=False))
    output = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def attention_by_official_op(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """The CUDA operator of Deformable DETR, which knows float32 only; casts count, as they do in its users."""
    batch, queries, heads, levels, points = offsets.shape[:5]
    weights = logits.float().softmax(-1).view(batch, queries, heads, levels, points)
    locations = sampling_locations(offsets.float(), reference_points, level_shapes)
    shapes = torch.tensor(level_shapes, device=value.device)
    areas = shapes.prod(1)
    output = _OfficialOp.apply(value.float(), shapes, areas.cumsum(0) - areas, locations, weights)
    return output.to(value.dtype)


class _OfficialOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        module = importlib.import_module(OFFICIAL_OP)
        return module.ms_deform_attn_forward(value, shapes, starts, locations, weights, IMAGES_AT_ONCE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        module = importlib.import_module(OFFICIAL_OP)
        found = module.ms_deform_attn_backward(*ctx.saved_tensors, grads[0].contiguous(), IMAGES_AT_ONCE)
        return found[0], None, None, found[1], found[2]


def match_whole_batch(
    logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, counts: Sequence[int], **weights: float
) -> list[list[tuple[Any, Any]]]:
    """DETR's matcher: every query of the batch against every target of the batch, then one assignment per image."""
    result = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        cost = matching_cost(layer_logits.flatten(0, 1), layer_boxes.flatten(0, 1), labels, target_boxes, **weights)
        blocks = cost.view(*layer_logits.shape[:2], -1).cpu().split(list(counts), -1)
        result.append([linear_sum_assignment(block[image]) for image, block in enumerate(blocks)])
    return result
