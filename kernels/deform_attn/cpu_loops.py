"""The numba loops behind `cpu`: serial, without the interpreter lock, over a range of the work.

Shapes as in `deform_attn` unless said otherwise; all arrays contiguous and of one floating type; levels (L, 3) int64:
height, width, first token. Two things here look odd and are worth a factor of two each:
* The loops over channels run on flat arrays with unsigned indices. A signed index makes numba test every element for
  a negative value, which turns vector loads into gathers.
* The sampling loops call no helper with an array argument: each such call costs atomic reference counting.
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
    value: Any, offsets: Any, logits: Any, references: Any, levels: Any, output: Any, start: int, stop: int
) -> None:
    """Writes output (B, Q, M, D) for the flat query indices start..stop of B * Q."""
    tokens, heads, channels = value.shape[1], value.shape[2], value.shape[3]
    queries, points = offsets.shape[1], offsets.shape[4]
    row, lanes = heads * channels, np.uintp(channels)
    number = value.dtype.type
    zero, one, half = number(0), number(1), number(0.5)
    cells, sums = value.reshape(-1), output.reshape(-1)
    weights = np.empty(logits.shape[3], value.dtype)
    for item in range(start, stop):
        b, q = item // queries, item % queries
        for m in range(heads):
            _softmax(logits, b, q, m, weights)
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
                    weight = weights[level * points + p]
                    corner = (b * tokens + first + top * width + left) * row + m * channels
                    for index in range(4):
                        right, low = index & 1, index >> 1
                        if left + right < 0 or top + low < 0 or left + right >= width or top + low >= height:
                            continue
                        share = weight * (right_share if right else one - right_share)
                        share *= low_share if low else one - low_share
                        cell = np.uintp(corner + (low * width + right) * row)
                        for d in range(lanes):
                            sums[at + d] += share * cells[cell + d]


@_jit
def backward(
    grad: Any,
    value: Any,
    offsets: Any,
    logits: Any,
    references: Any,
    levels: Any,
    grad_value: Any,
    grad_offsets: Any,
    grad_logits: Any,
    start: int,
    stop: int,
) -> None:
    """Adds to grad_value (zeroed by the caller) and writes grad_offsets and grad_logits, for the flat (image, head)
    indices start..stop of B * M. Here value and grad_value are (B, M, S, D): the rows of one head side by side stay
    in the cache.
    """
    tokens, channels = value.shape[2], value.shape[3]
    queries, heads, points = offsets.shape[1], offsets.shape[2], offsets.shape[4]
    lanes = np.uintp(channels)
    number = value.dtype.type
    zero, one, half = number(0), number(1), number(0.5)
    cells, targets, grads = value.reshape(-1), grad_value.reshape(-1), grad.reshape(-1)
    weights = np.empty(logits.shape[3], value.dtype)
    alongs = np.empty(logits.shape[3], value.dtype)
    for item in range(start, stop):
        b, m = item // heads, item % heads
        for q in range(queries):
            _softmax(logits, b, q, m, weights)
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
                    along_weight, along_x, along_y = zero, zero, zero
                    if x > -one and y > -one and x < wide and y < high:
                        left, top = np.int64(np.floor(x)), np.int64(np.floor(y))
                        right_share, low_share = x - number(left), y - number(top)
                        corner = (item * tokens + first + top * width + left) * channels
                        for index in range(4):
                            right, low = index & 1, index >> 1
                            if left + right < 0 or top + low < 0 or left + right >= width or top + low >= height:
                                continue
                            share_x = right_share if right else one - right_share
                            share_y = low_share if low else one - low_share
                            cell = np.uintp(corner + (low * width + right) * channels)
                            dot = zero
                            for d in range(lanes):
                                dot += grads[at + d] * cells[cell + d]
                            share = weights[k] * share_x * share_y
                            for d in range(lanes):
                                targets[cell + d] += share * grads[at + d]
                            along_weight += share_x * share_y * dot
                            along_x += dot * (share_y if right else -share_y)
                            along_y += dot * (share_x if low else -share_x)
                        along_x *= weights[k] * scale_x
                        along_y *= weights[k] * scale_y
                    alongs[k] = along_weight
                    mean += weights[k] * along_weight
                    grad_offsets[b, q, m, level, p, 0] = along_x
                    grad_offsets[b, q, m, level, p, 1] = along_y
            for k in range(weights.shape[0]):
                grad_logits[b, q, m, k] = weights[k] * (alongs[k] - mean)


@_jit
def _softmax(logits: Any, b: int, q: int, m: int, weights: Any) -> None:
    """weights (L * P,) = softmax of one row of logits."""
    largest = logits[b, q, m, 0]
    for k in range(weights.shape[0]):
        largest = max(largest, logits[b, q, m, k])
    total = weights.dtype.type(0)
    for k in range(weights.shape[0]):
        weights[k] = np.exp(logits[b, q, m, k] - largest)
        total += weights[k]
    for k in range(weights.shape[0]):
        weights[k] /= total
