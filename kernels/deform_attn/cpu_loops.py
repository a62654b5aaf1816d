"""The numba loops behind `cpu`: serial, without the interpreter lock, over a range of the work.

Shapes as in `deform_attn`, but D filled up with zeros to whole lines of numbers, and the L * P samples of a query and
head to whole lines as well: K of them (`lines.py`; for float32 a line is 16 numbers). All arrays contiguous and of one
floating type unless said otherwise; weights: (B, Q, M, K), softmax of the logits.

A line of samples is located at once, branch-free; then every sample inside its map moves whole lines of channels.
Cells outside the map are replaced by the cell of the same sample that is inside, with a share of zero.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernels.deform_attn.lines import (
    LINE_BYTES,
    add,
    bits,
    evens,
    first_pairs,
    floor,
    last_pairs,
    load,
    lowest,
    odds,
    prefetch,
    select,
    spread,
    store,
    sums_of_four,
    total,
    whole,
)

LINES_DIGEST = "91e775806aee93e1"  # first digits of the sha256 of lines.py, see there

# Reordering sums and fusing multiply-adds is allowed. Assuming "no NaN, no infinity" (the rest of fast-math) is left
# out: comparing with NaN is how broken coordinates are kept out.
_jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})


@_jit
def place_samples(references: Any, levels: Any, points: int, sizes: Any, origins: Any, places: Any) -> None:
    """What all heads share: location of sample k of a query = places[0..1, k] + offset * places[2..3, k], in pixels.

    references (B * Q, L, 2 | 4); levels (L, 3) int64: height, width, first token. Writes the first L * P of
    sizes (2, K): width, height of the map of sample k; origins (K) int64: its first token; places (B * Q, 4, K).
    """
    number = references.dtype.type
    half = number(0.5)
    for level in range(levels.shape[0]):
        wide, high = number(levels[level, 1]), number(levels[level, 0])
        samples = range(level * points, (level + 1) * points)
        for k in samples:
            sizes[0, k], sizes[1, k], origins[k] = wide, high, levels[level, 2]
        for query in range(references.shape[0]):
            scale_x = scale_y = number(1)
            if references.shape[2] == 4:
                scale_x = references[query, level, 2] * wide * half / number(points)
                scale_y = references[query, level, 3] * high * half / number(points)
            for k in samples:
                places[query, 0, k] = references[query, level, 0] * wide - half
                places[query, 1, k] = references[query, level, 1] * high - half
                places[query, 2, k], places[query, 3, k] = scale_x, scale_y


@_jit
def _neighbours(at: Any, inside: Any, size: Any, zero: Any, one: Any) -> Any:
    """Along one axis: the lower and the upper cell, their shares, and whether they exist.

    A cell that does not exist is replaced by the other one; its share is as if it existed.
    """
    at = select(inside, at, zero)
    lower = floor(at)
    upper, upper_share = lower + one, at - lower
    lower_exists, upper_exists = zero - one < lower, upper < size
    lower = select(lower_exists, lower, zero)
    upper = select(upper_exists, upper, lower)
    return whole(lower), whole(upper), one - upper_share, upper_share, lower_exists, upper_exists


@_jit
def _locate(x: Any, y: Any, wide: Any, high: Any, zero: Any, one: Any) -> Any:
    """Whether samples touch their maps, the four cells of each (counted from the map's first), and both axes."""
    inside = (zero - one < x) & (zero - one < y) & (x < wide) & (y < high)
    across, down = _neighbours(x, inside, wide, zero, one), _neighbours(y, inside, high, zero, one)
    top, low = down[0] * whole(wide), down[1] * whole(wide)
    return inside, (top + across[0], top + across[1], low + across[0], low + across[1]), across, down


@_jit
def _shares(weight: Any, across: Any, down: Any, zero: Any) -> Any:
    """What the four cells contribute; cells that do not exist nothing."""
    left, right = select(across[4], across[2], zero), select(across[5], across[3], zero)
    top, low = weight * select(down[4], down[2], zero), weight * select(down[5], down[3], zero)
    return top * left, top * right, low * left, low * right


@_jit
def _slopes(dots: Any, across: Any, down: Any, zero: Any) -> Any:
    """From the products of the four cells with the gradient: those of the sample, and its slopes along x and y."""
    top_left, top_right = select(down[4] & across[4], dots[0], zero), select(down[4] & across[5], dots[1], zero)
    low_left, low_right = select(down[5] & across[4], dots[2], zero), select(down[5] & across[5], dots[3], zero)
    top, low = across[2] * top_left + across[3] * top_right, across[2] * low_left + across[3] * low_right
    slope_x = down[2] * (top_right - top_left) + down[3] * (low_right - low_left)
    return down[2] * top + down[3] * low, slope_x, low - top


@_jit
def forward(value: Any, inputs: Any, order: Any, output: Any, start: int, stop: int) -> None:
    """Writes output (B, Q, M, D) for the flat query indices order[start..stop] of B * Q.

    inputs: offsets (B, Q, M, K, 2), weights, sizes, origins and places as `place_samples` wrote them.
    """
    offsets, weights, sizes, origins, places = inputs
    tokens, heads, channels = value.shape[1], value.shape[2], value.shape[3]
    queries, samples = offsets.shape[1], offsets.shape[3]
    lanes, row = LINE_BYTES // value.itemsize, heads * channels
    zero, one = spread(value.dtype.type(0)), spread(value.dtype.type(1))
    cells, sums, raw, weight_of = value.reshape(-1), output.reshape(-1), offsets.reshape(-1), weights.reshape(-1)
    size_of, place_of = sizes.reshape(-1), places.reshape(-1)
    corners, shares = np.empty(4 * lanes, np.int32), np.empty(4 * lanes, value.dtype)
    for turn in range(start, stop):
        query = order[turn]
        for head in range(heads):
            at = (query * heads + head) * channels
            for d in range(0, channels, lanes):
                store(sums, at + d, zero)
            for k in range(0, samples, lanes):
                item, place = (query * heads + head) * samples + k, query * 4 * samples + k
                near, far = load(raw, 2 * item), load(raw, 2 * item + lanes)
                x = load(place_of, place) + evens(near, far) * load(place_of, place + 2 * samples)
                y = load(place_of, place + samples) + odds(near, far) * load(place_of, place + 3 * samples)
                inside, cell, across, down = _locate(x, y, load(size_of, k), load(size_of, samples + k), zero, one)
                share = _shares(load(weight_of, item), across, down, zero)
                for corner in range(4):
                    store(corners, corner * lanes, cell[corner])
                    store(shares, corner * lanes, share[corner])
                # Where the value comes from memory, asking for all of it first saves about a fifth.
                todo = bits(inside)
                while todo:
                    j = lowest(todo)
                    todo &= todo - np.uint64(1)
                    first = (query // queries * tokens + origins[k + j]) * row + head * channels
                    for d in range(0, channels, lanes):
                        for corner in range(4):
                            prefetch(cells, first + corners[corner * lanes + j] * row + d)
                for d in range(0, channels, lanes):
                    top_left, top_right, low_left, low_right = load(sums, at + d), zero, zero, zero
                    todo = bits(inside)
                    while todo:
                        j = lowest(todo)
                        todo &= todo - np.uint64(1)
                        first = (query // queries * tokens + origins[k + j]) * row + head * channels + d
                        top_left += spread(shares[j]) * load(cells, first + corners[j] * row)
                        top_right += spread(shares[lanes + j]) * load(cells, first + corners[lanes + j] * row)
                        low_left += spread(shares[2 * lanes + j]) * load(cells, first + corners[2 * lanes + j] * row)
                        low_right += spread(shares[3 * lanes + j]) * load(cells, first + corners[3 * lanes + j] * row)
                    store(sums, at + d, (top_left + top_right) + (low_left + low_right))


@_jit
def backward(grad: Any, value: Any, inputs: Any, order: Any, steps: Any, gradients: Any, start: int, stop: int) -> None:
    """For the flat (image, head) indices start..stop of B * M; the queries of an image in the order of `order`.

    inputs: as in `forward`. gradients, written: of value (added to, zeroed before), offsets and logits.
    steps: numbers from one image, head and cell to the next in value and in its gradient.
    """
    offsets, weights, sizes, origins, places = inputs
    queries, heads, samples, channels = offsets.shape[1], offsets.shape[2], offsets.shape[3], grad.shape[3]
    image_step, head_step, cell_step = steps
    lanes = LINE_BYTES // value.itemsize
    zero, one = spread(value.dtype.type(0)), spread(value.dtype.type(1))
    cells, grads, raw, weight_of = value.reshape(-1), grad.reshape(-1), offsets.reshape(-1), weights.reshape(-1)
    size_of, place_of = sizes.reshape(-1), places.reshape(-1)
    targets, raw_slopes, logit_slopes = gradients[0].reshape(-1), gradients[1].reshape(-1), gradients[2].reshape(-1)
    corners, shares = np.empty(4 * lanes, np.int32), np.empty(4 * lanes, value.dtype)
    dots, alongs = np.empty(4 * lanes, value.dtype), np.empty(samples, value.dtype)
    for task in range(start, stop):
        image, head = task // heads, task % heads
        for turn in range(image * queries, (image + 1) * queries):
            query = order[turn]
            at, mean = (query * heads + head) * channels, zero
            for k in range(0, samples, lanes):
                item, place = (query * heads + head) * samples + k, query * 4 * samples + k
                near, far = load(raw, 2 * item), load(raw, 2 * item + lanes)
                scale_x, scale_y = load(place_of, place + 2 * samples), load(place_of, place + 3 * samples)
                x = load(place_of, place) + evens(near, far) * scale_x
                y = load(place_of, place + samples) + odds(near, far) * scale_y
                inside, cell, across, down = _locate(x, y, load(size_of, k), load(size_of, samples + k), zero, one)
                weight = load(weight_of, item)
                share = _shares(weight, across, down, zero)
                for corner in range(4):
                    store(corners, corner * lanes, cell[corner])
                    store(shares, corner * lanes, share[corner])
                    store(dots, corner * lanes, zero)
                todo = bits(inside)
                while todo:
                    j = lowest(todo)
                    todo &= todo - np.uint64(1)
                    first = image * image_step + head * head_step + origins[k + j] * cell_step
                    top_left, top_right = first + corners[j] * cell_step, first + corners[lanes + j] * cell_step
                    low_left = first + corners[2 * lanes + j] * cell_step
                    low_right = first + corners[3 * lanes + j] * cell_step
                    a, b, c, d = zero, zero, zero, zero
                    for lane in range(0, channels, lanes):
                        line = load(grads, at + lane)
                        a += line * load(cells, top_left + lane)
                        b += line * load(cells, top_right + lane)
                        c += line * load(cells, low_left + lane)
                        d += line * load(cells, low_right + lane)
                        add(targets, top_left + lane, line * spread(shares[j]))
                        add(targets, top_right + lane, line * spread(shares[lanes + j]))
                        add(targets, low_left + lane, line * spread(shares[2 * lanes + j]))
                        add(targets, low_right + lane, line * spread(shares[3 * lanes + j]))
                    store(dots, 4 * j, sums_of_four(a, b, c, d))
                upper, lower = (load(dots, 0), load(dots, lanes)), (load(dots, 2 * lanes), load(dots, 3 * lanes))
                left, right = (evens(*upper), evens(*lower)), (odds(*upper), odds(*lower))
                dot = evens(*left), evens(*right), odds(*left), odds(*right)
                along, slope_x, slope_y = _slopes(dot, across, down, zero)
                slope_x, slope_y = slope_x * weight * scale_x, slope_y * weight * scale_y
                slope_x, slope_y = select(inside, slope_x, zero), select(inside, slope_y, zero)
                store(raw_slopes, 2 * item, first_pairs(slope_x, slope_y))
                store(raw_slopes, 2 * item + lanes, last_pairs(slope_x, slope_y))
                store(alongs, k, along)
                mean += weight * along
            average = spread(total(mean))
            for k in range(0, samples, lanes):
                item = (query * heads + head) * samples + k
                store(logit_slopes, item, load(weight_of, item) * (load(alongs, k) - average))
