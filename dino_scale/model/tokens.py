"""Feature maps of all levels as one row of tokens, with what belongs to each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class Layout:
    """Geometry of the S tokens of a batch; level after level, row after row.

    shapes: (height, width) of each of the L levels, plain integers. padding: (B, S) bool, True on padding.
    valid_ratios: (B, L, 2) float32, the share of each map's width and height that is image.
    """

    shapes: tuple[tuple[int, int], ...]
    padding: Tensor
    valid_ratios: Tensor


def layout_of(masks: Sequence[Tensor]) -> Layout:
    """Layout of levels whose padding masks are (B, h, w) bool."""
    return Layout(
        shapes=tuple((mask.shape[1], mask.shape[2]) for mask in masks),
        padding=torch.cat([mask.flatten(1) for mask in masks], dim=1),
        valid_ratios=torch.stack([_valid_ratio(mask) for mask in masks], dim=1),
    )


def level_masks(padding_mask: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """The (B, H, W) padding mask at the size of every map (nearest, always from full resolution, as official)."""
    full = padding_mask[:, None].float()
    return [interpolate(full, size=one.shape[-2:])[:, 0].bool() for one in maps]


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, h, w) of all levels to tokens (B, S, C)."""
    return torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)


def pixel_grid(layout: Layout, level: int) -> Tensor:
    """x and y of each pixel's centre as a fraction of the valid part of its map: (B, h * w, 2) float32.

    Above 1 on padding.
    """
    height, width = layout.shapes[level]
    ratios = layout.valid_ratios
    y = torch.arange(height, dtype=torch.float32, device=ratios.device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=ratios.device) + 0.5
    # Rounded to the exact count of valid pixels: the border test of the proposals meets equality (49.5 / 50 = 0.99).
    x = x / (ratios[:, level, 0, None] * width).round()
    y = y / (ratios[:, level, 1, None] * height).round()
    return torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1).flatten(
        1, 2
    )


def _valid_ratio(mask: Tensor) -> Tensor:
    """(B, 2): valid share of the width and of the height; images lie in the top left corner."""
    height, width = mask.shape[-2:]
    valid_height = (~mask[:, :, 0]).sum(1).float() / height
    valid_width = (~mask[:, 0, :]).sum(1).float() / width
    return torch.stack([valid_width, valid_height], dim=-1)
