"""Deformable attention in plain torch: what every other implementation is compared with.

Deformable DETR (Zhu et al., 2020), section 4.1. Slow and simple on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_attn_reference(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """The same arguments and result as `deform_attn`, any device, differentiable any number of times.

    Computes in float64 where `value` is float64 and in float32 otherwise: bfloat16 coordinates would be off by whole
    cells, and torch's bfloat16 grid_sample on CPU is not reliable.
    """
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch, queries, heads, levels, points = offsets.shape[:5]
    channels = value.shape[3]
    attention = logits.to(compute).softmax(-1).view(batch, queries, heads, levels, points)
    locations = sampling_locations(offsets.to(compute), reference_points.to(compute), level_shapes)
    output = value.new_zeros((batch, queries, heads, channels), dtype=compute)
    start = 0
    for level, (height, width) in enumerate(level_shapes):
        feature_map = value[:, start : start + height * width].to(compute)
        start += height * width
        sampled = _sample(feature_map, locations[:, :, :, level], height, width)
        output = output + torch.einsum("bqmp,bmdqp->bqmd", attention[:, :, :, level], sampled)
    return output.reshape(batch, queries, heads * channels).to(value.dtype)


def sampling_locations(offsets: Tensor, reference_points: Tensor, level_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Where to sample, (B, Q, M, L, P, 2) as x, y in [0, 1] of each feature map.

    2-d references: reference + offset / (width, height). 4-d references (a box): centre + offset / P * size / 2.
    """
    points = offsets.shape[4]
    centre = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        scale = offsets.new_tensor([[width, height] for height, width in level_shapes])
        return centre + offsets / scale[None, None, None, :, None, :]
    return centre + offsets / points * reference_points[:, :, None, :, None, 2:] * 0.5


def _sample(feature_map: Tensor, locations: Tensor, height: int, width: int) -> Tensor:
    """Bilinear samples (B, M, D, Q, P) of one level (B, height * width, M, D) at (B, Q, M, P, 2), zeros outside."""
    batch, _, heads, channels = feature_map.shape
    queries, points = locations.shape[1], locations.shape[3]
    images = feature_map.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
    # A location more than a map away samples only zeros; replacing it keeps NaN and infinity out of the arithmetic.
    inside = ((locations > -1) & (locations < 2)).all(-1, keepdim=True)
    grid = torch.where(inside, locations, locations.new_tensor(-1.0)).transpose(1, 2) * 2 - 1
    grid = grid.reshape(batch * heads, queries, points, 2)
    sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.view(batch, heads, channels, queries, points)
