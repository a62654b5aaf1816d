"""DETR's training augmentation (official datasets/transforms.py), its geometry drawn apart from its execution.

The plan of a sample depends on its size and its draws only, so the size that comes out is known before a byte is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.decode import RGBImage, as_tensor
from dino_scale.config.schema import AugmentationConfig
from dino_scale.torchvision_compat import ensure_importable

ensure_importable()
from torchvision.transforms.v2 import InterpolationMode, functional  # noqa: E402

Executor = Literal["fast", "reference"]


class RandomDraws(Protocol):
    """What a plan draws, in the order of the official code (`order.Draws` is one)."""

    def uniform(self) -> float: ...
    def integer(self, low: int, high: int) -> int: ...
    def choice(self, values: Sequence[int]) -> int: ...
    def offset(self, most: int) -> int: ...


@dataclass(frozen=True)
class Resize:
    height: int
    width: int


@dataclass(frozen=True)
class Crop:
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """What happens to one image: flipped first, then the steps in order. size: (height, width) that comes out."""

    flip: bool
    steps: tuple[Resize | Crop, ...]
    size: tuple[int, int]


def resized(width: int, height: int, short_side: int, max_size: int | None) -> Resize:
    """Size of an image whose short side becomes `short_side`, unless the long one would exceed `max_size`.

    The official arithmetic: the long side is cut to a whole number, not rounded.
    """
    low, high = min(width, height), max(width, height)
    if max_size is not None and high / low * short_side > max_size:
        short_side = max(1, round(max_size * low / high))
    if low == short_side:
        return Resize(height, width)
    if width < height:
        return Resize(int(short_side * height / width), short_side)
    return Resize(short_side, int(short_side * width / height))


def sample_plan(width: int, height: int, config: AugmentationConfig, draws: RandomDraws) -> Plan:
    """Draws what happens to an image of width x height pixels.

    An image with a side below `crop_min` keeps that side whole (the official code fails there).
    """
    flip = draws.uniform() < config.flip
    steps: list[Resize | Crop] = []
    if draws.uniform() >= 1 - config.crop:
        first = resized(width, height, draws.choice(config.crop_resize), None)
        crop = _draw_crop(first, config, draws)
        steps += [first, crop]
        width, height = crop.width, crop.height
    last = resized(width, height, draws.choice(config.scales), config.max_size)
    return Plan(flip, (*steps, last), (last.height, last.width))


def _draw_crop(image: Resize, config: AugmentationConfig, draws: RandomDraws) -> Crop:
    width = draws.integer(min(config.crop_min, image.width), min(config.crop_max, image.width))
    height = draws.integer(min(config.crop_min, image.height), min(config.crop_max, image.height))
    if (height, width) == (image.height, image.width):
        return Crop(0, 0, height, width)  # the official code draws nothing here
    top = draws.offset(image.height - height)
    return Crop(top, draws.offset(image.width - width), height, width)


def apply_to_image(image: RGBImage, plan: Plan, executor: Executor = "fast") -> torch.Tensor:
    """(3, h, w) uint8 of (H, W, 3) pixels: bilinear, antialiased; `fast` is within 2/255 of `reference` per resize."""
    return _apply_reference(image, plan) if executor == "reference" else _apply_fast(image, plan)


def _apply_reference(image: RGBImage, plan: Plan) -> torch.Tensor:
    """With Pillow, step by step as the official code does."""
    picture = Image.fromarray(image)
    if plan.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for step in plan.steps:
        if isinstance(step, Crop):
            picture = picture.crop((step.left, step.top, step.left + step.width, step.top + step.height))
        else:
            picture = picture.resize((step.width, step.height), Image.Resampling.BILINEAR)
    return as_tensor(np.array(picture)).contiguous()


def _apply_fast(image: RGBImage, plan: Plan) -> torch.Tensor:
    pixels = as_tensor(image)
    if plan.flip:
        pixels = pixels.flip(-1)
    for step in plan.steps:
        if isinstance(step, Crop):
            pixels = pixels[:, step.top : step.top + step.height, step.left : step.left + step.width]
        else:
            pixels = _resize(pixels, step)
    return pixels.contiguous()


def apply_to_boxes(
    boxes: NDArray[np.float64], width: int, height: int, plan: Plan
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Moves (n, 4) boxes x1, y1, x2, y2 along with an image of width x height pixels.

    Returns (n, 4) boxes in pixels of the result and (n,) whether a box still has an area; crops clip.
    """
    boxes = boxes.copy()
    if plan.flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    keep: NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    for step in plan.steps:
        if isinstance(step, Crop):
            boxes -= np.array([step.left, step.top, step.left, step.top])
            boxes = boxes.clip(0, np.array([step.width, step.height, step.width, step.height]))
            keep = keep & np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        else:
            boxes = boxes * np.array([step.width / width, step.height / height] * 2)
        width, height = step.width, step.height
    return boxes, keep


def resize_for_evaluation(image: RGBImage, short_side: int, max_size: int) -> torch.Tensor:
    """(3, h, w) uint8 of (H, W, 3) pixels, resized as for validation."""
    height, width = image.shape[:2]
    return _resize(as_tensor(image), resized(width, height, short_side, max_size)).contiguous()


def _resize(pixels: torch.Tensor, size: Resize) -> torch.Tensor:
    if tuple(pixels.shape[-2:]) == (size.height, size.width):
        return pixels
    return functional.resize(
        pixels, [size.height, size.width], interpolation=InterpolationMode.BILINEAR, antialias=True
    )
