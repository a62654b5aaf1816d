"""The numba loops behind `cpu`: serial, without the interpreter lock, over a range of the work.

Shapes as in `deform_attn` unless said otherwise; all arrays contiguous and of one floating type; weights: softmax of
the logits; levels (L, 3) int64: height, width, first token. Three things here look odd and are worth much time:
* The loops over channels run on flat arrays with unsigned indices. A signed index makes numba test every element for
  a negative value, which turns vector loads into gathers.
* The sampling loops call no helper with an array argument: each such call costs atomic reference counting.
* The two cells of a line share one loop: every number written then takes two products along.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# Reordering sums and fusing multiply-adds makes the loops over channels vector code. Assuming "no NaN, no infinity"
# (the rest of fast-math) is left out: comparing with NaN is how broken coordinates are kept out.
_jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})


@_jit
def forward(
    value: Any, offsets: Any, weights: Any, references: Any, levels: Any, output: Any, start: int, stop: int
) -> None:
    """Writes output (B, Q, M, D) for the flat query indices start..stop of B * Q."""
    tokens, heads, channels = value.shape[1], value.shape[2], value.shape[3]
    queries, points = offsets.shape[1], offsets.shape[4]
    row, lanes = heads * channels, np.uintp(channels)
    number = value.dtype.type
    zero, one, half = number(0), number(1), number(0.5)
    cells, sums = value.reshape(-1), output.reshape(-1)
    for item in range(start, stop):
        b, q = item // queries, item % queries
        for m in range(heads):
            at = np.uintp(item * row + m * channels)
            for d in range(lanes):
                sums[at + d] = zero
            for level in range(levels.shape[0]):
                height, width, first = levels[level, 0], levels[level, 1], levels[level, 2]
                wide, high = number(width), number(height)
                base_x = references[b, q, level, 0] * wide - half
                base_y = references[b, q, level, 1] * high - half
                scale_x, scale_y = one, one
                if references.shape[3] == 4:
                    scale_x = references[b, q, level, 2] * wide * half / number(points)
                    scale_y = references[b, q, level, 3] * high * half / number(points)
                for p in range(points):
                    x = base_x + offsets[b, q, m, level, p, 0] * scale_x
                    y = base_y + offsets[b, q, m, level, p, 1] * scale_y
                    if not (x > -one and y > -one and x < wide and y < high):
                        continue
                    left, top = np.int64(np.floor(x)), np.int64(np.floor(y))
                    right_share, low_share = x - number(left), y - number(top)
                    weight = weights[b, q, m, level * points + p]
                    for low in range(2):
                        if top + low < 0 or top + low >= height:
                            continue
                        share = weight * (low_share if low else one - low_share)
                        left_part, right_part = share * (one - right_share), share * right_share
                        corner = (b * tokens + first + (top + low) * width + left) * row + m * channels
                        near, far = np.uintp(corner), np.uintp(corner + row)
                        if left >= 0 and left + 1 < width:
                            for d in range(lanes):
                                sums[at + d] += left_part * cells[near + d] + right_part * cells[far + d]
                        elif left >= 0:
                            for d in range(lanes):
                                sums[at + d] += left_part * cells[near + d]
                        else:
                            # Left of the map; on a map of one column this is the only cell there is.
                            for d in range(lanes):
                                sums[at + d] += right_part * cells[far + d]


@_jit
def backward(grad: Any, inputs: Any, steps: Any, gradients: Any, start: int, stop: int) -> None:
    """For the flat (image, head) indices start..stop of B * M.

    inputs: value, offsets, weights, references, levels. gradients, written: of value (added to, zeroed before), offsets
    and logits. steps: numbers from one image, head and cell to the next in value and in its gradient.
    """
    value, offsets, weights, references, levels = inputs
    grad_value, grad_offsets, grad_logits = gradients
    image_step, head_step, cell_step = steps
    channels = value.shape[3]
    queries, heads, points = offsets.shape[1], offsets.shape[2], offsets.shape[4]
    lanes = np.uintp(channels)
    number = value.dtype.type
    zero, one, half = number(0), number(1), number(0.5)
    cells, targets, grads = value.reshape(-1), grad_value.reshape(-1), grad.reshape(-1)
    alongs = np.empty(weights.shape[3], value.dtype)
    for item in range(start, stop):
        b, m = item // heads, item % heads
        image = b * image_step + m * head_step
        for q in range(queries):
            at = np.uintp(((b * queries + q) * heads + m) * channels)
            mean = zero
            for level in range(levels.shape[0]):
                height, width, first = levels[level, 0], levels[level, 1], levels[level, 2]
                wide, high = number(width), number(height)
                base_x = references[b, q, level, 0] * wide - half
                base_y = references[b, q, level, 1] * high - half
                scale_x, scale_y = one, one
                if references.shape[3] == 4:
                    scale_x = references[b, q, level, 2] * wide * half / number(points)
                    scale_y = references[b, q, level, 3] * high * half / number(points)
                for p in range(points):
                    k = level * points + p
                    x = base_x + offsets[b, q, m, level, p, 0] * scale_x
                    y = base_y + offsets[b, q, m, level, p, 1] * scale_y
                    weight = weights[b, q, m, k]
                    along_weight, along_x, along_y = zero, zero, zero
                    if x > -one and y > -one and x < wide and y < high:
                        left, top = np.int64(np.floor(x)), np.int64(np.floor(y))
                        right_share, low_share = x - number(left), y - number(top)
                        for low in range(2):
                            if top + low < 0 or top + low >= height:
                                continue
                            share_y = low_share if low else one - low_share
                            left_part, right_part = (
                                weight * share_y * (one - right_share),
                                weight * share_y * right_share,
                            )
                            corner = image + (first + (top + low) * width + left) * cell_step
                            near, far = np.uintp(corner), np.uintp(corner + cell_step)
                            near_dot, far_dot = zero, zero
                            if left >= 0 and left + 1 < width:
                                for d in range(lanes):
                                    near_dot += grads[at + d] * cells[near + d]
                                    far_dot += grads[at + d] * cells[far + d]
                                for d in range(lanes):
                                    targets[near + d] += left_part * grads[at + d]
                                    targets[far + d] += right_part * grads[at + d]
                            else:
                                only, part = (near, left_part) if left >= 0 else (far, right_part)
                                for d in range(lanes):
                                    near_dot += grads[at + d] * cells[only + d]
                                    targets[only + d] += part * grads[at + d]
                                if left < 0:
                                    near_dot, far_dot = zero, near_dot
                            along = near_dot + right_share * (far_dot - near_dot)
                            along_weight += share_y * along
                            along_x += share_y * (far_dot - near_dot)
                            along_y += along if low else -along
                        along_x *= weight * scale_x
                        along_y *= weight * scale_y
                    alongs[k] = along_weight
                    mean += weight * along_weight
                    grad_offsets[b, q, m, level, p, 0] = along_x
                    grad_offsets[b, q, m, level, p, 1] = along_y
            for k in range(weights.shape[3]):
                grad_logits[b, q, m, k] = weights[b, q, m, k] * (alongs[k] - mean)
