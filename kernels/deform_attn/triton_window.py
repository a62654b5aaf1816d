"""A second way to the value gradient, for encoders: sums over a tile of queries before anything is added to memory.

In an encoder every token is a query, and neighbours sample nearly the same cells. One program takes a tile of 8 x 8
queries, one head and one level to sample from. With G (64, D) the output gradients of its queries and W (64, cells)
the share of every query in every cell of a window around the tile, W^T G are the sums for all cells of the window: one
addition per cell and tile in place of one per cell, sample and query. Samples outside the window are added one by one.

The window follows from the place of the tile alone, so that any references are right, only those far from their own
token slow. Where a gradient is not finite, so is every cell of its tile's window that any query of the tile samples.

Never chosen by itself: whether it is faster than the direct way no GPU has said yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.deform_attn import triton_backward
from kernels.deform_attn.triton_backward import ADD_FIXED, ADD_FLOATS, add_rows, row_softmax
from kernels.deform_attn.triton_sampling import (
    COMPUTE_TYPES,
    SIZES,
    contiguous,
    level_size,
    locate,
    over_channels,
    packed_levels,
    reference_pixels,
)
from kernels.deform_attn.tuning import window_shape

TILE, SIDE = tl.constexpr(8), tl.constexpr(16)
LEAST_CHANNELS = 16  # of a matrix product


def backward(
    grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_backward.backward`. Raises ValueError where queries are not the tokens."""
    if offsets.shape[1] != value.shape[1]:
        raise ValueError(
            f"deform_attn: impl='triton_windowed' got {offsets.shape[1]} queries and {value.shape[1]} tokens, but "
            "needs one query per token, in their order; use impl='triton'"
        )
    return triton_backward.backward(grad, value, offsets, logits, reference_points, sizes, _add_values)


def _add_values(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    sizes: list[int],
    sums: Tensor,
    scale: Tensor,
    fixed: bool,
) -> None:
    batch, tokens, heads, channels = value.shape
    levels, points = offsets.shape[3:5]
    tiles = sum(
        triton.cdiv(height, TILE.value) * triton.cdiv(width, TILE.value)
        for height, width in zip(sizes[::2], sizes[1::2], strict=True)
    )
    block = max(LEAST_CHANNELS, triton.next_power_of_2(sums.shape[3]))
    shape = window_shape(block * value.dtype.itemsize, levels * points)
    deform_attn_window_kernel[(tiles * levels, heads, batch)](
        *contiguous(grad, offsets, logits, reference_points),
        sums,
        scale,
        tokens,
        *packed_levels(sizes),
        HEADS=heads,
        CHANNELS=channels,
        PADDED=sums.shape[3],
        LEVELS=levels,
        POINTS=points,
        BOX=reference_points.shape[3] == 4,
        ADDING=(ADD_FIXED if fixed else ADD_FLOATS).value,
        COMPUTE=COMPUTE_TYPES.get(value.dtype, tl.float32),
        PRECISION=precision(value.dtype.itemsize),
        BLOCK_CHANNELS=block,
        BLOCK_SAMPLES=triton.next_power_of_2(levels * points),
        CELLS=shape.cells,
        num_warps=shape.warps,
    )


def precision(bytes_per_value: int) -> str:
    """Of the matrix products: eleven bits are enough beside bfloat16 values, three passes of them for float32."""
    return {2: "tf32", 4: "tf32x3", 8: "ieee"}[bytes_per_value]


@triton.jit
def _tile_place(number, target, level0, level1, level2, level3, level4, LEVELS: tl.constexpr):
    """Row, column and first query of tile `number` with the height and width of its level; and of level `target` the
    height, width and first token."""
    row, column, height, width, first = number * 0, number * 0, number * 0 + 1, number * 0 + 1, number * 0
    target_height, target_width, target_first = number * 0 + 1, number * 0 + 1, number * 0
    tiles_before, tokens_before = number * 0, number * 0
    for level in tl.static_range(LEVELS):
        own_height, own_width = level_size(level, level0, level1, level2, level3, level4)
        across = (own_width + TILE - 1) // TILE
        tiles = (own_height + TILE - 1) // TILE * across
        here = (number >= tiles_before) & (number < tiles_before + tiles)
        row = tl.where(here, (number - tiles_before) // across * TILE, row)
        column = tl.where(here, (number - tiles_before) % across * TILE, column)
        height, width = tl.where(here, own_height, height), tl.where(here, own_width, width)
        first = tl.where(here, tokens_before, first)
        target_height = tl.where(target == level, own_height, target_height)
        target_width = tl.where(target == level, own_width, target_width)
        target_first = tl.where(target == level, tokens_before, target_first)
        tiles_before += tiles
        tokens_before += own_height * own_width
    return row, column, height, width, first, target_height, target_width, target_first


@triton.jit
def _sample_place(logits, offsets, sample, present, largest, share_of_total, base_x, base_y, scale_x, scale_y):
    """Attention weight and pixel of one sample of every query."""
    compute = base_x.dtype
    weight = tl.exp(tl.load(logits + sample, mask=present, other=0.0).to(compute) - largest) * share_of_total
    x = base_x + tl.load(offsets + sample * 2, mask=present, other=0.0).to(compute) * scale_x
    y = base_y + tl.load(offsets + sample * 2 + 1, mask=present, other=0.0).to(compute) * scale_y
    return weight, x, y


@triton.jit
def _in_window(x, y, height, width, window_x, window_y, present):
    """Whether a sample touches the map, and whether all four cells around it lie in the window."""
    inside = present & (x > -1.0) & (y > -1.0) & (x < width.to(x.dtype)) & (y < height.to(y.dtype))
    left = tl.floor(tl.where(inside, x, 0.0)).to(tl.int32) - window_x
    top = tl.floor(tl.where(inside, y, 0.0)).to(tl.int32) - window_y
    return inside, inside & (left >= 0) & (left < SIDE - 1) & (top >= 0) & (top < SIDE - 1)


@triton.jit(do_not_specialize=["tokens", *SIZES[2:]])
def deform_attn_window_kernel(
    grad, offsets, logits, references, sums, fixed_point_scale, tokens, level0, level1, level2, level3, level4,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BOX: tl.constexpr, ADDING: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    SAMPLES: tl.constexpr = LEVELS * POINTS
    STEP: tl.constexpr = HEADS * PADDED
    target = tl.program_id(0) % LEVELS
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile_row, tile_column, tile_height, tile_width, first, height, width, first_token = _tile_place(
        tl.program_id(0) // LEVELS, target, level0, level1, level2, level3, level4, LEVELS
    )
    place = tl.arange(0, TILE * TILE)
    line, column = tile_row + place // TILE, tile_column + place % TILE
    present = (line < tile_height) & (column < tile_width)
    item = image * tokens + first + line * tile_width + column
    row = item * HEADS + head
    window_x = (tile_column + TILE // 2) * width // tile_width - SIDE // 2
    window_y = (tile_row + TILE // 2) * height // tile_height - SIDE // 2
    scale = 1.0
    if ADDING == ADD_FIXED:
        scale = tl.load(fixed_point_scale)
    index = tl.arange(0, BLOCK_SAMPLES)[None, :]
    known = present[:, None] & (index < SAMPLES)
    scores = tl.load(logits + row[:, None] * SAMPLES + index, mask=known, other=float("-inf")).to(COMPUTE)
    _exponentials, largest, share_of_total = row_softmax(scores, present)
    channel = tl.max_contiguous(tl.arange(0, BLOCK_CHANNELS), 4)[None, :]
    mask = over_channels(present, CHANNELS, BLOCK_CHANNELS)
    gradient = tl.load(grad + row[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(COMPUTE)
    base_x, base_y, scale_x, scale_y = reference_pixels(
        references, item, present, height, width, target, LEVELS, POINTS, BOX, COMPUTE
    )
    first_sample = row * SAMPLES + target * POINTS
    cells = sums + (image * tokens + first_token) * STEP + head * PADDED
    for begin in range(0, SIDE * SIDE, CELLS):
        number = begin + tl.arange(0, CELLS)
        cell_x, cell_y = window_x + number % SIDE, window_y + number // SIDE
        shares = tl.zeros([TILE * TILE, CELLS], COMPUTE)
        for point in range(POINTS):
            weight, x, y = _sample_place(
                logits,
                offsets,
                first_sample + point,
                present,
                largest,
                share_of_total,
                base_x,
                base_y,
                scale_x,
                scale_y,
            )
            inside, near = _in_window(x, y, height, width, window_x, window_y, present)
            x, y = tl.where(near, x, -9.0), tl.where(near, y, -9.0)
            across = tl.maximum(1.0 - tl.abs(x[:, None] - cell_x[None, :].to(COMPUTE)), 0.0)
            down = tl.maximum(1.0 - tl.abs(y[:, None] - cell_y[None, :].to(COMPUTE)), 0.0)
            shares += tl.where(near, weight, 0.0)[:, None] * across * down
        total = tl.dot(tl.trans(shares), gradient, input_precision=PRECISION, out_dtype=COMPUTE)
        exists = (cell_x >= 0) & (cell_x < width) & (cell_y >= 0) & (cell_y < height)
        # Not "is above 0": a share that is not a number has to arrive.
        touched = over_channels(exists & (tl.sum(shares, 0) != 0.0), PADDED, BLOCK_CHANNELS)
        cell = cells + ((cell_y * width + cell_x).to(tl.int64) * STEP)[:, None] + channel
        add_rows(cell, tl.full([CELLS], 1.0, COMPUTE), total, scale, touched, ADDING)
    for point in range(POINTS):
        weight, x, y = _sample_place(
            logits, offsets, first_sample + point, present, largest, share_of_total, base_x, base_y, scale_x, scale_y
        )
        inside, near = _in_window(x, y, height, width, window_x, window_y, present)
        _add_far(x, y, weight, inside & (near == 0), height, width, cells, channel, gradient, scale, STEP, PADDED,
                 BLOCK_CHANNELS, ADDING)  # fmt: skip


@triton.jit
def _add_far(
    x, y, weight, far, height, width, cells, channel, gradient, scale,
    STEP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ADDING: tl.constexpr,
):  # fmt: skip
    """Adds samples outside the window to their four cells one by one."""
    cell, right, low, _, mask00, mask01, mask10, mask11 = locate(x, y, height, width, far)
    place = cells + (cell.to(tl.int64) * STEP)[:, None] + channel
    below = place + width.to(tl.int64) * STEP
    upper, lower = (1.0 - low) * weight, low * weight
    add_rows(place, upper * (1.0 - right), gradient, scale, over_channels(mask00, PADDED, BLOCK), ADDING)
    add_rows(place + STEP, upper * right, gradient, scale, over_channels(mask01, PADDED, BLOCK), ADDING)
    add_rows(below, lower * (1.0 - right), gradient, scale, over_channels(mask10, PADDED, BLOCK), ADDING)
    add_rows(below + STEP, lower * right, gradient, scale, over_channels(mask11, PADDED, BLOCK), ADDING)
