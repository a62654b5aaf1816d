"""The usual way from a sample to a batch, for comparison: what the official code does, in torch and Pillow on the CPU.

Targets take the same steps as images: lists of boxes become tensors, are clamped, flipped, cropped, filtered, scaled
and made relative, with areas and crowd flags along; images are decoded and resized by Pillow, then made float32 and
normalised.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.index import SampleBoxes
from data_pipeline.reader import Reader
from data_pipeline.transforms import Crop, Plan, apply_to_image

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
Targets = dict[str, Tensor]


def official_batch(
    reader: Reader, samples: Sequence[int], plans: Sequence[Plan]
) -> tuple[Tensor, Tensor, list[Targets]]:
    """(B, 3, H, W) float32 normalised, (B, H, W) bool that is true on padding, and the targets of every image."""
    images, targets = [], []
    for sample, plan in zip(samples, plans, strict=True):
        with Image.open(io.BytesIO(reader.image_bytes(sample))) as picture:
            pixels = np.array(picture.convert("RGB"))
        scaled = apply_to_image(pixels, plan, "reference").float().div_(255)
        images.append((scaled - MEAN) / STD)
        targets.append(_targets(reader.index.boxes(sample), pixels.shape[1], pixels.shape[0], plan))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for place, mask, image in zip(batch, padding, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
        mask[: image.shape[1], : image.shape[2]] = False
    return batch, padding, targets


def _targets(truth: SampleBoxes, width: int, height: int, plan: Plan) -> Targets:
    kept = [row for row in range(len(truth.labels)) if not truth.crowd[row]]
    boxes = torch.as_tensor([truth.boxes[row].tolist() for row in kept], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    found: Targets = {
        "boxes": boxes,
        "labels": torch.tensor([int(truth.labels[row]) for row in kept], dtype=torch.int64),
        "area": torch.tensor([float(truth.areas[row]) for row in kept]),
        "iscrowd": torch.zeros(len(kept), dtype=torch.int64),
    }
    found = _with_extent(found)
    if plan.flip:
        left, top, right, bottom = found["boxes"].unbind(1)
        found["boxes"] = torch.stack([width - right, top, width - left, bottom], dim=1)
    for step in plan.steps:
        if isinstance(step, Crop):
            limit = torch.tensor([step.width, step.height] * 2, dtype=torch.float32)
            moved = found["boxes"] - torch.tensor([step.left, step.top] * 2, dtype=torch.float32)
            found["boxes"] = torch.minimum(moved, limit).clamp(min=0)
            found["area"] = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(dim=1)
            found = _with_extent(found)
        else:
            across, down = step.width / width, step.height / height
            found["boxes"] = found["boxes"] * torch.tensor([across, down, across, down])
            found["area"] = found["area"] * (across * down)
        width, height = step.width, step.height
    low, high = found["boxes"][:, :2], found["boxes"][:, 2:]
    relative = torch.cat([(low + high) / 2, high - low], dim=1) / torch.tensor([width, height] * 2)
    return {**found, "boxes": relative}


def _with_extent(targets: Targets) -> Targets:
    keep = (targets["boxes"][:, 2:] > targets["boxes"][:, :2]).all(dim=1)
    return {name: values[keep] for name, values in targets.items()}
