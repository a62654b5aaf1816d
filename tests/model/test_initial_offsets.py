"""Where attention samples before anything is learned."""

from __future__ import annotations

import torch

from dino_scale.model.attention import DeformableAttention
from dino_scale.model.dino import build_model
from tests.support.tiny_detector import CLASSES, tiny


def test_no_initial_sample_lies_on_a_pixel_centre() -> None:
    """There the slope of bilinear interpolation jumps, and rounding would choose the side (docs/determinism.md)."""
    torch.manual_seed(0)
    model = build_model(tiny(), CLASSES)
    attentions = [module for module in model.modules() if isinstance(module, DeformableAttention)]
    assert len(attentions) == 3
    for attention in attentions:
        assert not attention.offsets.weight.any()
        bias = attention.offsets.bias.detach()
        beside = bias - bias.round()
        assert float(beside.abs().min()) > 0.01
        assert float(beside[bias.abs() < 0.5].abs().max()) < 0.05, "the directions stay what they were"
