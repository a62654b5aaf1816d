"""What the kernels are timed on: layers of DINO, and matching problems of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Case = tuple[Tensor, Tensor, Tensor, Tensor]
NAME = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LAYERS, QUERIES, CLASSES = 7, 900, 91
COLLAPSE = 1e-2  # how far collapsed predictions lie apart, of how far they usually do


@dataclass(frozen=True)
class Layer:
    """queries 0: one per token, as in the encoder; otherwise boxes are the references, as in the decoder."""

    name: str
    level_shapes: tuple[tuple[int, int], ...]
    batch: int
    queries: int


SQUARE = ((80, 80), (40, 40), (20, 20), (10, 10))
COCO = ((100, 167), (50, 84), (25, 42), (13, 21))
SWEEP = {
    "cpu": (Layer("encoder 640x640", SQUARE, 1, 0), Layer("decoder 640x640, 1100 queries", SQUARE, 1, 1100)),
    "cuda": (
        Layer("encoder 640x640", SQUARE, 2, 0),
        Layer("encoder 800x1333", COCO, 2, 0),
        Layer("decoder 800x1333, 1100 queries", COCO, 2, 1100),
    ),
}


def attention_case(layer: Layer, dtype: torch.dtype, device: torch.device) -> Case:
    """Eight heads of 32 channels and four points; offsets of two pixels, about where training puts them."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in layer.level_shapes)
    levels, queries = len(layer.level_shapes), layer.queries or tokens
    offsets = torch.randn(layer.batch, queries, 8, levels, 4, 2, generator=draw) * 2
    if layer.queries:
        sizes = torch.rand(layer.batch, queries, 1, 2, generator=draw) * 0.3 + 0.05
        references = torch.cat([torch.rand(layer.batch, queries, 1, 2, generator=draw), sizes], -1)
    else:
        references = _pixel_centres(layer.level_shapes)[None, :, None].expand(layer.batch, -1, -1, -1)
    value = torch.randn(layer.batch, tokens, 8, 32, generator=draw)
    logits = torch.randn(layer.batch, queries, 8, levels * 4, generator=draw)
    learnt = [tensor.to(device, dtype).requires_grad_() for tensor in (value, offsets, logits)]
    return learnt[0], learnt[1], learnt[2], references.expand(-1, -1, levels, -1).contiguous().to(device)


def _pixel_centres(level_shapes: tuple[tuple[int, int], ...]) -> Tensor:
    centres = []
    for height, width in level_shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(centres)


def matching_case(boxes: int, collapsed: bool, device: torch.device) -> tuple[Any, ...]:
    """Seven layers of eight images with `boxes` targets each. collapsed: all queries predict nearly the same, as early
    in training, which leaves an assignment solver with the longest paths."""
    draw, images = torch.Generator().manual_seed(0), 8
    logits = torch.randn(LAYERS, images, QUERIES, CLASSES, generator=draw)
    predicted = torch.rand(LAYERS, images, QUERIES, 4, generator=draw) * 0.4 + 0.1
    if collapsed:
        logits = logits[:, :, :1] + COLLAPSE * logits
        predicted = predicted[:, :, :1] + COLLAPSE * predicted
    labels = torch.randint(CLASSES, (images * boxes,), generator=draw)
    targets = torch.rand(images * boxes, 4, generator=draw) * 0.4 + 0.1
    return *(tensor.to(device) for tensor in (logits, predicted, labels, targets)), [boxes] * images
