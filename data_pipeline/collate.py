"""Samples of different sizes become one padded Batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dino_scale.structures import Batch, Targets


@dataclass(frozen=True)
class Sample:
    """One image ready for a batch. image: (3, h, w) uint8. boxes: (n, 4) float64 x1, y1, x2, y2 in its pixels.
    labels: (n,) contiguous. original_size: (height, width) on disk."""

    image: torch.Tensor
    boxes: NDArray[np.float64]
    labels: NDArray[np.int32]
    original_size: tuple[int, int]
    sample_id: int
    image_id: int


def collate(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """Pads to the largest height and width, each rounded up to a multiple of `multiple`, with zeros to the right and
    below."""
    sizes = tuple((sample.image.shape[1], sample.image.shape[2]) for sample in samples)
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)
    for place, sample in zip(images, samples, strict=True):
        place[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    return Batch(
        images=images,
        sizes=sizes,
        original_sizes=tuple(sample.original_size for sample in samples),
        sample_ids=tuple(sample.sample_id for sample in samples),
        image_ids=tuple(sample.image_id for sample in samples),
        targets=Targets(
            labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples]).astype(np.int64)),
            boxes=torch.cat([_relative(sample) for sample in samples]),
            counts=tuple(len(sample.labels) for sample in samples),
        ),
    )


def _relative(sample: Sample) -> torch.Tensor:
    """(n, 4) float32 centre x, centre y, width, height, divided by the width and height of the image."""
    low, high = sample.boxes[:, :2], sample.boxes[:, 2:]
    centred = np.concatenate([(low + high) / 2, high - low], axis=1)
    height, width = sample.image.shape[1:]
    return torch.from_numpy((centred / np.array([width, height, width, height])).astype(np.float32))
