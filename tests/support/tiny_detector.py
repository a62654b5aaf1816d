"""A detector and batches small enough for tests of a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dino_scale.config.schema import BackboneConfig, DenoisingConfig, ModelConfig
from dino_scale.structures import Targets

CLASSES = 5

TINY_BACKBONE = BackboneConfig(
    name="resnet10t", arguments={"channels": [8, 16, 24, 32], "stem_width": 8}, norm="group", frozen_stages=0
)
TINY = ModelConfig(
    backbone=TINY_BACKBONE,
    hidden=32,
    heads=4,
    feedforward=48,
    encoder_layers=1,
    decoder_layers=2,
    queries=20,
    denoising=DenoisingConfig(queries=6),
    attention="reference",
)

_NONE = DenoisingConfig(kind="none")
ANCESTORS: dict[str, dict[str, Any]] = {
    "deformable_detr_plain": {
        "query_selection": "none",
        "query_form": "point",
        "refinement": False,
        "look_forward": "once",
        "denoising": _NONE,
    },
    "deformable_detr_refining": {
        "query_selection": "none",
        "query_form": "point",
        "look_forward": "once",
        "denoising": _NONE,
    },
    "deformable_detr_two_stage": {
        "query_selection": "pure",
        "query_form": "point",
        "look_forward": "once",
        "denoising": _NONE,
    },
    "dab_deformable_detr": {"query_selection": "none", "look_forward": "once", "denoising": _NONE},
    "dn_deformable_detr": {
        "query_selection": "none",
        "look_forward": "once",
        "denoising": DenoisingConfig(kind="plain", queries=6, box_noise=0.4),
    },
    "dino_pure_selection": {"query_selection": "pure"},
    "dino_without_refinement": {"refinement": False},
    "dino_five_levels": {"levels": 5},
    "dino": {},
}


def tiny(**changes: Any) -> ModelConfig:
    return replace(TINY, **changes)


def images(batch: int, height: int = 64, width: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised images and padding mask; every image but the first is padded by a fourth on the right and below."""
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    padding[1:, height - height // 4 :] = True
    padding[1:, :, width - width // 4 :] = True
    return pixels.masked_fill(padding[:, None], 0), padding


def targets(*counts: int, classes: int = CLASSES, seed: int = 0) -> Targets:
    """Boxes inside their image, with sides between 0.1 and 0.4."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    size = 0.1 + 0.3 * torch.rand(total, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(total, 2, generator=generator)
    labels = torch.randint(0, classes, (total,), generator=generator)
    return Targets(labels, torch.cat([centre, size], dim=1), counts)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
