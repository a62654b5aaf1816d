"""Deformable attention backward as one Triton kernel, on the same blocks as the forward one.

Everything is computed anew from the raw inputs. With a_k the attention weight of sample k, s_k its bilinear sample and
g the gradient of the output: grad logit_k = a_k (g.s_k - sum_j a_j g.s_j), and every corner of every sample adds a
multiple of g to one row of the value gradient. These additions are the cost of the kernel. They go to a float32
buffer whose rows are padded to whole groups of four channels, so that they are wide atomics for any head size.

Float additions commute but do not associate: the value gradient depends in its last bits on the order in which
programs run. Under `torch.use_deterministic_algorithms(True)` the sums are 64-bit integers of fixed point instead,
whose result depends on no order; it takes twice the atomic traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from kernels.deform_attn.tuning import launch_shape

GROUP = 4
# What a kernel does with the value gradient. Of these the kernels need to know while compiling.
ADD_FLOATS, ADD_FIXED, ADD_NOTHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Bits of a sum in fixed point below its sign, and the largest power of two taken as a scale.
SUM_BITS, LARGEST_EXPONENT = 62, 126


def backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    sizes: list[int],
    add_values: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits, each contiguous and in the dtype of its tensor.

    add_values: adds the value gradient in place of this kernel, see `triton_window`.
    """
    batch, tokens, heads, channels = value.shape
    queries, _, levels, points = offsets.shape[1:5]
    grad_offsets = torch.empty(offsets.shape, dtype=offsets.dtype, device=value.device)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=value.device)
    if batch * queries * heads * channels == 0:
        return torch.zeros_like(value, memory_format=torch.contiguous_format), grad_offsets, grad_logits
    fixed = torch.are_deterministic_algorithms_enabled()
    padded = math.ceil(channels / GROUP) * GROUP
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    sums = torch.zeros((batch, tokens, heads, padded), dtype=torch.int64 if fixed else compute, device=value.device)
    scale = _fixed_point_scale(grad, queries) if fixed else sums
    adding = (ADD_FIXED if fixed else ADD_FLOATS).value
    if add_values is not None:
        add_values(grad, value, offsets, logits, reference_points, sizes, sums, scale, fixed)
        adding = ADD_NOTHING.value
    box = reference_points.shape[3] == 4
    shape = launch_shape("backward", channels, levels, points, value.dtype, box, fixed)
    deform_attn_backward_kernel[(triton.cdiv(queries, shape.queries), heads, batch)](
        *contiguous(grad, value, offsets, logits, reference_points),
        sums,
        grad_offsets,
        grad_logits,
        scale,
        queries,
        tokens,
        *packed_levels(sizes),
        HEADS=heads,
        CHANNELS=channels,
        PADDED=padded,
        LEVELS=levels,
        POINTS=points,
        BOX=box,
        ADDING=adding,
        COMPUTE=COMPUTE_TYPES.get(value.dtype, tl.float32),
        BLOCK_QUERIES=shape.queries,
        BLOCK_CHANNELS=triton.next_power_of_2(padded),
        BLOCK_SAMPLES=triton.next_power_of_2(levels * points),
        num_warps=shape.warps,
        maxnreg=shape.registers,
    )
    grad_value = sums[..., :channels]
    if fixed:
        grad_value = grad_value.double() / scale
    return grad_value.to(value.dtype).contiguous(), grad_offsets, grad_logits


def _fixed_point_scale(grad: Tensor, queries: int) -> Tensor:
    """A power of two, float32 of one element, so large that no sum overflows; NaN where the gradient is not finite.

    All attention weights of one query and head add up to one, so a sum is at most queries * max |grad|.
    """
    largest = grad.abs().amax().double()
    exponent = torch.log2(largest.clamp(min=1e-300)).floor() + 1 + math.ceil(math.log2(queries))
    scale = torch.exp2((SUM_BITS - exponent).clamp(max=LARGEST_EXPONENT))
    return torch.where(largest.isfinite(), scale, math.nan).float()


@triton.jit
def add_rows(place, share, gradient, scale, mask, ADDING: tl.constexpr):
    """Adds share * gradient to rows of the value gradient."""
    if ADDING == ADD_FIXED:
        tl.atomic_add(place, (gradient * share[:, None] * scale).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(place, gradient * share[:, None], mask=mask, sem="relaxed")


@triton.jit
def _dot_rows(place, gradient, mask):
    return tl.sum(gradient * tl.load(place, mask=mask, other=0.0).to(gradient.dtype), 1)


@triton.jit
def row_softmax(scores, present):
    """exp(score - largest), the largest of each row, and one over the sum of the exponentials."""
    largest = tl.where(present, tl.max(scores, 1), 0.0)
    exponentials = tl.exp(scores - largest[:, None])
    return exponentials, largest, 1.0 / tl.where(present, tl.sum(exponentials, 1), 1.0)


@triton.jit
def _one_sample(
    x,
    y,
    scale_x,
    scale_y,
    weight,
    height,
    width,
    present,
    cells,
    targets,
    gradient,
    channel,
    scale,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDING: tl.constexpr,
):
    """Adds the sample's part of the value gradient, unless ADDING says nothing is added. Returns gradient.sample, and
    weight times its slopes by the offsets, which are 0 where the sample lies outside."""
    STEP: tl.constexpr = HEADS * CHANNELS
    SUM_STEP: tl.constexpr = HEADS * PADDED
    cell, right, low, inside, mask00, mask01, mask10, mask11 = locate(x, y, height, width, present)
    left, up = 1.0 - right, 1.0 - low
    place = cells + (cell.to(tl.int64) * STEP)[:, None] + channel
    below = place + width.to(tl.int64) * STEP
    dot00 = _dot_rows(place, gradient, over_channels(mask00, CHANNELS, BLOCK))
    dot01 = _dot_rows(place + STEP, gradient, over_channels(mask01, CHANNELS, BLOCK))
    dot10 = _dot_rows(below, gradient, over_channels(mask10, CHANNELS, BLOCK))
    dot11 = _dot_rows(below + STEP, gradient, over_channels(mask11, CHANNELS, BLOCK))
    if ADDING != ADD_NOTHING:
        target = targets + (cell.to(tl.int64) * SUM_STEP)[:, None] + channel
        under = target + width.to(tl.int64) * SUM_STEP
        add_rows(target, weight * up * left, gradient, scale, over_channels(mask00, PADDED, BLOCK), ADDING)
        add_rows(target + SUM_STEP, weight * up * right, gradient, scale, over_channels(mask01, PADDED, BLOCK), ADDING)
        add_rows(under, weight * low * left, gradient, scale, over_channels(mask10, PADDED, BLOCK), ADDING)
        add_rows(under + SUM_STEP, weight * low * right, gradient, scale, over_channels(mask11, PADDED, BLOCK), ADDING)
    along = up * (left * dot00 + right * dot01) + low * (left * dot10 + right * dot11)
    slope_x = scale_x * weight * (up * (dot01 - dot00) + low * (dot11 - dot10))
    slope_y = scale_y * weight * (left * (dot10 - dot00) + right * (dot11 - dot01))
    return along, tl.where(inside, slope_x, 0.0), tl.where(inside, slope_y, 0.0)


@triton.jit(do_not_specialize=SIZES)
def deform_attn_backward_kernel(
    grad,
    value,
    offsets,
    logits,
    references,
    sums,
    grad_offsets,
    grad_logits,
    fixed_point_scale,
    queries,
    tokens,
    level0,
    level1,
    level2,
    level3,
    level4,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BOX: tl.constexpr,
    ADDING: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
):
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    present = query < queries
    item = image * queries + query
    row = item * HEADS + head
    # Four channels per thread for the loads too, although they could be wider: what one thread loads is what it adds.
    channel = tl.max_contiguous(tl.arange(0, BLOCK_CHANNELS), 4)[None, :]
    SAMPLES: tl.constexpr = LEVELS * POINTS
    STEP: tl.constexpr = HEADS * CHANNELS
    SUM_STEP: tl.constexpr = HEADS * PADDED
    scale = 1.0
    if ADDING == ADD_FIXED:
        scale = tl.load(fixed_point_scale)
    index = tl.arange(0, BLOCK_SAMPLES)[None, :]
    known = present[:, None] & (index < SAMPLES)
    scores = tl.load(logits + row[:, None] * SAMPLES + index, mask=known, other=float("-inf")).to(COMPUTE)
    exponentials, largest, share_of_total = row_softmax(scores, present)
    mask = over_channels(present, CHANNELS, BLOCK_CHANNELS)
    gradient = tl.load(grad + row[:, None] * CHANNELS + channel, mask=mask, other=0.0).to(COMPUTE)
    cells = value + image * tokens * STEP + head * CHANNELS
    targets = sums + image * tokens * SUM_STEP + head * PADDED
    alongs, slopes_x, slopes_y = tl.zeros_like(exponentials), tl.zeros_like(exponentials), tl.zeros_like(exponentials)
    for level in tl.static_range(LEVELS):
        height, width = level_size(level, level0, level1, level2, level3, level4)
        base_x, base_y, scale_x, scale_y = reference_pixels(
            references, item, present, height, width, level, LEVELS, POINTS, BOX, COMPUTE
        )
        # Not unrolled: the body is long, and its instructions would not fit the cache.
        for point in range(POINTS):
            place_in_row = level * POINTS + point
            sample = row * SAMPLES + place_in_row
            weight = tl.exp(tl.load(logits + sample, mask=present, other=0.0).to(COMPUTE) - largest) * share_of_total
            x = base_x + tl.load(offsets + sample * 2, mask=present, other=0.0).to(COMPUTE) * scale_x
            y = base_y + tl.load(offsets + sample * 2 + 1, mask=present, other=0.0).to(COMPUTE) * scale_y
            along, slope_x, slope_y = _one_sample(
                x, y, scale_x, scale_y, weight, height, width, present, cells, targets, gradient, channel,
                scale, HEADS, CHANNELS, PADDED, BLOCK_CHANNELS, ADDING,
            )  # fmt: skip
            here = index == place_in_row
            alongs = tl.where(here, along[:, None], alongs)
            slopes_x = tl.where(here, slope_x[:, None], slopes_x)
            slopes_y = tl.where(here, slope_y[:, None], slopes_y)
        cells += height.to(tl.int64) * width * STEP
        targets += height.to(tl.int64) * width * SUM_STEP
    weights = exponentials * share_of_total[:, None]
    mean = tl.sum(weights * alongs, 1)
    first = row[:, None] * SAMPLES + index
    tl.store(grad_offsets + first * 2, slopes_x, mask=known)
    tl.store(grad_offsets + first * 2 + 1, slopes_y, mask=known)
    tl.store(grad_logits + first, weights * (alongs - mean[:, None]), mask=known)
