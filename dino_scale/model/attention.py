"""The two attentions of the detector: deformable over feature maps, standard among queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.deform_attn import deform_attn


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with its four projections (Deformable DETR, section 4.1; official MSDeformAttn).

    impl: implementation of the operator, see `kernels.deform_attn.deform_attn`.
    """

    def __init__(self, hidden: int, heads: int, levels: int, points: int, impl: str) -> None:
        super().__init__()
        self.heads, self.levels, self.points, self.impl = heads, levels, points, impl
        self.offsets = nn.Linear(hidden, heads * levels * points * 2)
        self.weights = nn.Linear(hidden, heads * levels * points)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        padding: Tensor,
        level_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """query: (B, Q, C). reference_points: (B, Q, L, 2 | 4) float32. tokens: (B, S, C). padding: (B, S) bool.

        Returns (B, Q, C). A gradient that `reference_points` require reaches them through the sampling offsets.
        """
        # Zeroed after the projection, so that its bias is absent from padding too.
        value = self.value(tokens).masked_fill(padding[..., None], 0).unflatten(-1, (self.heads, -1))
        offsets = self.offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        if reference_points.requires_grad:
            offsets = _carry_gradient(offsets, reference_points, level_shapes)
        logits = self.weights(query).unflatten(-1, (self.heads, self.levels * self.points))
        sampled = deform_attn(value, offsets, logits, reference_points.detach(), level_shapes, self.impl)
        return self.output(sampled)


def _carry_gradient(offsets: Tensor, reference: Tensor, level_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The offsets, unchanged in value, through which the gradient of the sampling places reaches `reference`.

    The operator returns no gradient for reference points, because only learned ones (no query selection) need it.
    A place is centre + offset * unit; moving the centre by d is moving the offset by d / unit.
    """
    fixed = reference.detach()
    if reference.shape[-1] == 2:
        unit = fixed.new_tensor([(1 / width, 1 / height) for height, width in level_shapes])
        growth = torch.ones_like(reference)
    else:
        size = fixed[..., 2:].clamp(min=torch.finfo(fixed.dtype).eps)
        unit = size / (2 * offsets.shape[-2])
        growth = reference[..., 2:] - fixed[..., 2:] + size
        growth = growth / size
    shift = (reference[..., :2] - fixed[..., :2]) / unit
    return offsets * growth[:, :, None, :, None] + shift[:, :, None, :, None]


class SelfAttention(nn.Module):
    """Multi-head attention among queries; equal to nn.MultiheadAttention with q = k = x + position and v = x.

    The joint projection is a parameter of this module (not of a Linear used in parts), because ZeRO stage 3 makes a
    module's own parameters whole while its forward runs.
    """

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projection_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.projection_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.output = nn.Linear(hidden, hidden)
        nn.init.xavier_uniform_(self.projection_weight)

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor | None) -> Tensor:
        """x, position: (B, Q, C). allowed: (Q, Q) bool, True where a row may see a column; None: everywhere."""
        hidden = x.shape[-1]
        placed = functional.linear(
            x + position, self.projection_weight[: 2 * hidden], self.projection_bias[: 2 * hidden]
        )
        query, key = placed.chunk(2, dim=-1)
        value = functional.linear(x, self.projection_weight[2 * hidden :], self.projection_bias[2 * hidden :])
        dropout = self.dropout if self.training else 0.0
        mixed = _attend([part.unflatten(-1, (self.heads, -1)) for part in (query, key, value)], allowed, dropout)
        return self.output(mixed.flatten(2))


def _attend(parts: list[Tensor], allowed: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention of query, key and value (B, Q, M, D): (B, Q, M, D).

    In float32 on the CPU: the backward of torch's bfloat16 kernel is six times slower there (torch 2.13).
    """
    query, key, value = (part.transpose(1, 2) for part in parts)
    widen = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if widen:
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
    return mixed.transpose(1, 2)
