"""Initial values of everything outside the backbone (official DeformableTransformer._reset_parameters and DINO)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dino_scale.model.attention import DeformableAttention, SelfAttention
from dino_scale.model.heads import BoxHead
from dino_scale.model.queries import LearnedQueries

_FOREGROUND = 0.01  # initial probability of every class, so that the focal loss starts small
# In pixels, on every initial sampling offset. The official offsets are whole pixels, so that a quarter of all samples
# would lie exactly on pixel centres, where bilinear interpolation has a kink: the side whose slope counts would be up
# to the last bit, and runs that differ only in rounding (other numbers of workers) would part within ten steps.
_OFF_THE_KINK = 0.02


def xavier_matrices(module: nn.Module) -> None:
    """Xavier uniform for every parameter of two or more dimensions; biases and norms stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def initialise_attention(module: nn.Module) -> None:
    """The attentions inside `module`; after `xavier_matrices`, which they override in part."""
    for part in module.modules():
        if isinstance(part, DeformableAttention):
            _initialise_deformable(part)
        if isinstance(part, SelfAttention):
            nn.init.zeros_(part.projection_bias)
            nn.init.zeros_(part.output.bias)


def initialise_heads(class_head: nn.Linear, box_head: BoxHead) -> None:
    """torch's default for linear layers, every class at a probability of 1 %, boxes that start at their reference."""
    class_head.reset_parameters()
    nn.init.constant_(class_head.bias, -math.log((1 - _FOREGROUND) / _FOREGROUND))
    for layer in box_head.layers:
        assert isinstance(layer, nn.Linear)
        layer.reset_parameters()
    nn.init.zeros_(box_head.layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(box_head.layers[-1].bias)  # type: ignore[arg-type]


def initialise_convolutions(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise_learned(queries: LearnedQueries) -> None:
    """The projection from learned positions to reference points; the rest of them is normal already."""
    if queries.positions is not None:
        nn.init.xavier_uniform_(queries.point.weight)
        nn.init.zeros_(queries.point.bias)


def sampling_directions(heads: int, levels: int, points: int) -> Tensor:
    """Initial offsets (heads * levels * points * 2): each head looks in a direction of its own, ever farther."""
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rays = rays / rays.abs().amax(dim=-1, keepdim=True)
    distance = torch.arange(1, points + 1, dtype=torch.float32)
    return (rays[:, None, None, :] * distance[:, None]).expand(heads, levels, points, 2).flatten()


def _initialise_deformable(attention: DeformableAttention) -> None:
    nn.init.zeros_(attention.offsets.weight)
    with torch.no_grad():
        directions = sampling_directions(attention.heads, attention.levels, attention.points)
        attention.offsets.bias.copy_(directions + _OFF_THE_KINK)
    nn.init.zeros_(attention.weights.weight)
    nn.init.zeros_(attention.weights.bias)
    for projection in (attention.value, attention.output):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)
