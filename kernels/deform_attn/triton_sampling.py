"""Parts that the forward and the backward kernel share: where a sample lies on its feature map.

A program handles BLOCK_QUERIES queries of one head of one image; vectors below are over these queries. Coordinates,
weights and sums are of type COMPUTE: float32, or float64 for float64 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_LEVELS = 5
COMPUTE_TYPES = {torch.float64: tl.float64}
# Sizes change with every batch of images. Compiling again for "divisible by 16" or "is 1" would gain nothing.
SIZES = ["queries", "tokens", *(f"level{number}" for number in range(MOST_LEVELS))]
LARGEST_SIDE = 2**15 - 1


def packed_levels(sizes: list[int]) -> list[int]:
    """height * 2**16 + width of MOST_LEVELS levels, as the kernels take them; the ones that do not exist are 0."""
    if len(sizes) > 2 * MOST_LEVELS:
        raise ValueError(
            f"deform_attn: impl='triton' takes at most {MOST_LEVELS} levels, got {len(sizes) // 2}; "
            "use impl='reference' for more"
        )
    if max(sizes) > LARGEST_SIDE:
        raise ValueError(
            f"deform_attn: impl='triton' takes levels of at most {LARGEST_SIDE} rows and columns, got {max(sizes)}; "
            "use impl='reference' for larger ones"
        )
    packed = [height << 16 | width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
    return packed + [0] * (MOST_LEVELS - len(packed))


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in tensors]


@triton.jit
def level_size(LEVEL: tl.constexpr, level0, level1, level2, level3, level4):
    """Height and width of one level, which one is settled while compiling."""
    if LEVEL == 0:
        packed = level0
    elif LEVEL == 1:
        packed = level1
    elif LEVEL == 2:
        packed = level2
    elif LEVEL == 3:
        packed = level3
    else:
        packed = level4
    return packed >> 16, packed & 0xFFFF


@triton.jit
def reference_pixels(
    references,
    item,
    present,
    height,
    width,
    level,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BOX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Reference points in pixels of the level, and the pixels that one unit of offset stands for, as x, y, x, y."""
    place = references + (item * LEVELS + level) * (4 if BOX else 2)
    wide, high = width.to(COMPUTE), height.to(COMPUTE)
    x = tl.load(place, mask=present, other=0.0).to(COMPUTE) * wide - 0.5
    y = tl.load(place + 1, mask=present, other=0.0).to(COMPUTE) * high - 0.5
    if BOX:
        scale_x = tl.load(place + 2, mask=present, other=0.0).to(COMPUTE) * wide * (0.5 / POINTS)
        scale_y = tl.load(place + 3, mask=present, other=0.0).to(COMPUTE) * high * (0.5 / POINTS)
    else:
        scale_x = tl.full(x.shape, 1.0, COMPUTE)
        scale_y = tl.full(x.shape, 1.0, COMPUTE)
    return x, y, scale_x, scale_y


@triton.jit
def locate(x, y, height, width, present):
    """Cell above and to the left within the level, shares to the right of it and below, and which corners exist.

    A sample that touches no cell has no corners; comparing with NaN is false, so broken coordinates end there too.
    """
    inside = present & (x > -1.0) & (y > -1.0) & (x < width.to(x.dtype)) & (y < height.to(y.dtype))
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    column, line = left.to(tl.int32), top.to(tl.int32)
    on_left, on_right = inside & (column >= 0), inside & (column + 1 < width)
    on_top, on_bottom = line >= 0, line + 1 < height
    cell = line * width + column
    return (
        cell,
        x - left,
        y - top,
        inside,
        on_left & on_top,
        on_right & on_top,
        on_left & on_bottom,
        on_right & on_bottom,
    )


@triton.jit
def over_channels(mask, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A mask over queries as one over (queries, channels). Where every channel exists it stays one column wide, so
    that the compiler sees that a row is read or written as a whole."""
    if CHANNELS == BLOCK:  # noqa: SIM108 - decided while compiling, which only a statement is
        both = mask[:, None]
    else:
        both = mask[:, None] & (tl.arange(0, BLOCK) < CHANNELS)[None, :]
    return both
