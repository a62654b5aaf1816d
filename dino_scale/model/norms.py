"""Normalisations that do not depend on the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_GROUPS = 32  # of the group normalisation (official input_proj)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as divide narrow maps; at least two channels in each, for maps of a single pixel."""
    groups = math.gcd(_GROUPS, channels)
    return nn.GroupNorm(groups if groups < channels else max(1, channels // 2), channels)


class FrozenBatchNorm(nn.Module):
    """x * scale + shift with four buffers (official FrozenBatchNorm2d); nothing trains, nothing is tracked.

    One fused pass that keeps no copy of x for the backward, in the dtype of x also under autocast.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("weight", torch.ones(features))
        self.register_buffer("bias", torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)."""
        scale = self.weight * (self.running_var + self.epsilon).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])
