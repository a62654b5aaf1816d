"""Sine encodings of places and boxes, always float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TURN = 2 * math.pi
_BOX_TEMPERATURE = 10000.0  # official gen_sineembed_for_position
_EPSILON = 1e-6


def encode_image(padding: Tensor, channels: int, temperature: float) -> Tensor:
    """Sine encoding of every pixel's place within the valid part of its image (official PositionEmbeddingSineHW).

    padding: (B, h, w) bool, True on padding. Returns (B, h * w, channels) float32: half for y, half for x.
    """
    valid = ~padding
    y = valid.cumsum(dim=1, dtype=torch.float32)
    x = valid.cumsum(dim=2, dtype=torch.float32)
    y = y / (y[:, -1:, :] + _EPSILON) * _TURN
    x = x / (x[:, :, -1:] + _EPSILON) * _TURN
    place = torch.stack([y, x], dim=-1)
    return _waves(place, channels // 2, temperature).flatten(1, 2)


def encode_boxes(boxes: Tensor, channels: int) -> Tensor:
    """Sine encoding of points or centred boxes (..., 2 | 4) in [0, 1]: (..., n * channels), in order y, x, w, h."""
    order = [1, 0, 2, 3][: boxes.shape[-1]]
    return _waves(boxes[..., order] * _TURN, channels, _BOX_TEMPERATURE)


def _waves(coordinates: Tensor, channels: int, temperature: float) -> Tensor:
    """(..., n) to (..., n * channels): sine and cosine in turn, at wavelengths from 1 to `temperature` turns."""
    index = torch.arange(channels, dtype=torch.float32, device=coordinates.device)
    wavelength = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)
    phase = coordinates[..., None] / wavelength
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(-3)
