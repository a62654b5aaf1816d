"""From pixels to the network's input, on the device the batch is on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_scale.structures import Batch
from kernels.transfer import to_device


def normalise(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(images, padding mask) of a batch.

    images: (B, 3, H, W) float32, (pixel / 255 - mean) / std; padding is exactly 0, as if added after normalisation.
    padding mask: (B, H, W) bool, True on padding.
    """
    device = batch.images.device
    scale = to_device((1 / (255 * torch.tensor(std))).view(1, 3, 1, 1), device)
    shift = to_device((torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1), device)
    padding = batch.padding_mask()
    images = (batch.images * scale - shift).masked_fill(padding[:, None], 0)
    return images, padding
