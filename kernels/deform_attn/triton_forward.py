"""Deformable attention forward as one Triton kernel: softmax, locations, sampling and weighting in registers.

One program per block of queries, head and image. It reads every raw input once and the sampled rows of `value`, and
writes the output; nothing of size (queries x samples) touches memory.
"""

from __future__ import annotations

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


def forward(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]) -> Tensor:
    """(B, Q, M * D) in the dtype of `value`; arguments as checked by the operator."""
    batch, tokens, heads, channels = value.shape
    queries, _, levels, points = offsets.shape[1:5]
    output = torch.empty((batch, queries, heads * channels), dtype=value.dtype, device=value.device)
    if output.numel() == 0:
        return output
    box = reference_points.shape[3] == 4
    shape = launch_shape("forward", channels, levels, points, value.dtype, box)
    deform_attn_forward_kernel[(triton.cdiv(queries, shape.queries), heads, batch)](
        *contiguous(value, offsets, logits, reference_points),
        output,
        queries,
        tokens,
        *packed_levels(sizes),
        HEADS=heads,
        CHANNELS=channels,
        LEVELS=levels,
        POINTS=points,
        BOX=box,
        COMPUTE=COMPUTE_TYPES.get(value.dtype, tl.float32),
        BLOCK_QUERIES=shape.queries,
        BLOCK_CHANNELS=triton.next_power_of_2(channels),
        num_warps=shape.warps,
        maxnreg=shape.registers,
    )
    return output


@triton.jit(do_not_specialize=SIZES)
def deform_attn_forward_kernel(
    value,
    offsets,
    logits,
    references,
    output,
    queries,
    tokens,
    level0,
    level1,
    level2,
    level3,
    level4,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BOX: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    present = query < queries
    item = image * queries + query
    row = item * HEADS + head
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    SAMPLES: tl.constexpr = LEVELS * POINTS
    STEP: tl.constexpr = HEADS * CHANNELS
    largest = tl.load(logits + row * SAMPLES, mask=present, other=0.0).to(COMPUTE)
    for index in tl.static_range(1, SAMPLES):
        largest = tl.maximum(largest, tl.load(logits + row * SAMPLES + index, mask=present, other=0.0).to(COMPUTE))
    total = tl.zeros([BLOCK_QUERIES], COMPUTE)
    result = tl.zeros([BLOCK_QUERIES, BLOCK_CHANNELS], COMPUTE)
    cells = value + image * tokens * STEP + head * CHANNELS
    for level in tl.static_range(LEVELS):
        height, width = level_size(level, level0, level1, level2, level3, level4)
        base_x, base_y, scale_x, scale_y = reference_pixels(
            references, item, present, height, width, level, LEVELS, POINTS, BOX, COMPUTE
        )
        for point in tl.static_range(POINTS):
            sample = row * SAMPLES + level * POINTS + point
            # Divided by the total at the end, which is known only then.
            weight = tl.exp(tl.load(logits + sample, mask=present, other=0.0).to(COMPUTE) - largest)
            total += weight
            x = base_x + tl.load(offsets + sample * 2, mask=present, other=0.0).to(COMPUTE) * scale_x
            y = base_y + tl.load(offsets + sample * 2 + 1, mask=present, other=0.0).to(COMPUTE) * scale_y
            cell, right, low, _, mask00, mask01, mask10, mask11 = locate(x, y, height, width, present)
            place = cells + (cell.to(tl.int64) * STEP)[:, None] + channel
            below = place + width.to(tl.int64) * STEP
            upper, lower = (1.0 - low) * weight, low * weight
            mask = over_channels(mask00, CHANNELS, BLOCK_CHANNELS)
            result += tl.load(place, mask=mask, other=0.0).to(COMPUTE) * ((1.0 - right) * upper)[:, None]
            mask = over_channels(mask01, CHANNELS, BLOCK_CHANNELS)
            result += tl.load(place + STEP, mask=mask, other=0.0).to(COMPUTE) * (right * upper)[:, None]
            mask = over_channels(mask10, CHANNELS, BLOCK_CHANNELS)
            result += tl.load(below, mask=mask, other=0.0).to(COMPUTE) * ((1.0 - right) * lower)[:, None]
            mask = over_channels(mask11, CHANNELS, BLOCK_CHANNELS)
            result += tl.load(below + STEP, mask=mask, other=0.0).to(COMPUTE) * (right * lower)[:, None]
        cells += height.to(tl.int64) * width * STEP
    result = result / total[:, None]
    mask = over_channels(present, CHANNELS, BLOCK_CHANNELS)
    tl.store(output + row[:, None] * CHANNELS + channel, result, mask=mask)
