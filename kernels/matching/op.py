"""Matching of a whole step: ragged costs of every (layer, image) in one batch of operations, then exact assignments.

Only the cost of a target against the queries of its own image is computed, and only at its own class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels.matching.reference import AREA_EPSILON, GAMMA, LOG_EPSILON
from kernels.threads import in_threads
from kernels.transfer import to_device

# What a pair with a NaN or infinite cost is taken to cost: worse than any real pair, and small enough that adding a
# few hundred of them in float64 still tells two real costs apart.
BROKEN_COST = 1e9
# Below this many cells of cost, starting threads takes longer than solving.
CELLS_WORTH_THREADS = 1_000_000
CELLS_IN_CACHE = 32_768


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: Sequence[int],
    *,
    class_cost: float,
    box_cost: float,
    giou_cost: float,
    alpha: float,
) -> Tensor:
    """The query of every target in every layer, (Lyr, T) int64 on the device of `logits`, counted within its image.

    Each (layer, image) is one linear assignment problem (DETR, section 3.1): every target gets a query of its own and
    the sum of costs is minimal. In an image with more targets than queries every query gets a target, and the targets
    left over have -1; the sum is minimal again (so does the official matcher). Cost = class_cost * focal +
    box_cost * L1 - giou_cost * GIoU, in float32; a NaN or infinite cost counts as BROKEN_COST. The same inputs give the
    same result, ties included.

    logits: (Lyr, B, N, C), any floating type. boxes: (Lyr, B, N, 4) as cx, cy, w, h.
    labels: (T,) int64 and target_boxes: (T, 4), images one after the other; counts: targets per image, length B.
    On CUDA both steps run on the device, and nothing waits for the host; elsewhere, and for a batch in which an image
    has more targets than queries, scipy assigns on the host, in threads.
    Raises ValueError where counts do not fit the other arguments.
    """
    return _match(logits, boxes, labels, target_boxes, list(counts), class_cost, box_cost, giou_cost, alpha)


@torch.library.custom_op("dino_scale::match", mutates_args=())
def _match(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: list[int],
    class_cost: float,
    box_cost: float,
    giou_cost: float,
    alpha: float,
) -> Tensor:
    """One node for torch.compile, which could not look into scipy."""
    _check(logits, boxes, labels, target_boxes, counts)
    layers, targets = logits.shape[0], labels.shape[0]
    if layers == 0 or targets == 0:
        return torch.zeros((layers, targets), dtype=torch.int64, device=logits.device)
    if logits.device.type == "cuda" and max(counts) <= logits.shape[2]:
        from kernels.matching.triton_assignment import match_on_device

        weights = {"class_cost": class_cost, "box_cost": box_cost, "giou_cost": giou_cost, "alpha": alpha}
        return match_on_device(logits, boxes, labels, target_boxes, counts, **weights, broken_cost=BROKEN_COST)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts)))
    image = to_device(image, logits.device)
    # On a CPU a few targets at a time, so that the twenty-odd intermediate results stay in the cache.
    cells = layers * logits.shape[2]
    step = max(1, CELLS_IN_CACHE // cells)
    cost = torch.empty((targets, layers, logits.shape[2]), dtype=torch.float32, device=logits.device)
    by_class, by_coordinate = logits.permute(1, 3, 0, 2), boxes.float().permute(3, 1, 0, 2).contiguous()
    for part in (slice(start, start + step) for start in range(0, targets, step)):
        focal = _focal_cost(by_class[image[part], labels[part]].float(), alpha)
        distance, overlap = _box_costs(by_coordinate[:, image[part]], target_boxes[part].float().t()[:, :, None, None])
        cost[part] = box_cost * distance + class_cost * focal - giou_cost * overlap
    cost.nan_to_num_(nan=BROKEN_COST, posinf=BROKEN_COST, neginf=BROKEN_COST)
    return torch.from_numpy(_assign(cost.cpu().numpy(), counts)).to(logits.device)


@_match.register_fake
def _(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: list[int],
    class_cost: float,
    box_cost: float,
    giou_cost: float,
    alpha: float,
) -> Tensor:
    return labels.new_empty((logits.shape[0], labels.shape[0]), dtype=torch.int64)


def _check(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, counts: Sequence[int]) -> None:
    if logits.dim() != 4 or boxes.shape != (*logits.shape[:3], 4):
        raise ValueError(
            f"match: expected logits (layers, B, N, C) and boxes (layers, B, N, 4), got {tuple(logits.shape)} and "
            f"{tuple(boxes.shape)}"
        )
    if labels.dim() != 1 or target_boxes.shape != (labels.shape[0], 4):
        raise ValueError(
            f"match: expected labels (T,) and target_boxes (T, 4), got {tuple(labels.shape)} and "
            f"{tuple(target_boxes.shape)}"
        )
    if len(counts) != logits.shape[1] or sum(counts) != labels.shape[0] or min(counts, default=0) < 0:
        raise ValueError(
            f"match: counts {list(counts)} must have one entry per image ({logits.shape[1]}) and sum to the number of "
            f"targets ({labels.shape[0]})"
        )


def _focal_cost(logits: Tensor, alpha: float) -> Tensor:
    """Focal loss of the target's class as a positive minus as a negative, in the shape of its logits."""
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** GAMMA * -(probability + LOG_EPSILON).log()
    negative = (1 - alpha) * probability**GAMMA * -(1 - probability + LOG_EPSILON).log()
    return positive - negative


def _box_costs(query_boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and GIoU, each (T, Lyr, N), of boxes (4, T, Lyr, N) and (4, T, 1, 1) as cx, cy, w, h."""
    queries, targets = query_boxes.unbind(0), target_boxes.unbind(0)
    distance = (queries[0] - targets[0]).abs()
    for query, target in zip(queries[1:], targets[1:], strict=True):
        distance += (query - target).abs()
    left, top, right, bottom = _corners(queries)
    target_left, target_top, target_right, target_bottom = _corners(targets)
    inside_width = (torch.minimum(right, target_right) - torch.maximum(left, target_left)).clamp_(min=0)
    inside_height = (torch.minimum(bottom, target_bottom) - torch.maximum(top, target_top)).clamp_(min=0)
    hull_width = (torch.maximum(right, target_right) - torch.minimum(left, target_left)).clamp_(min=0)
    hull_height = (torch.maximum(bottom, target_bottom) - torch.minimum(top, target_top)).clamp_(min=0)
    intersection, hull = inside_width * inside_height, hull_width * hull_height
    target_area = (target_right - target_left) * (target_bottom - target_top)
    union = (right - left) * (bottom - top) + target_area - intersection
    overlap = intersection / (union + AREA_EPSILON) - (hull - union) / (hull + AREA_EPSILON)
    return distance, overlap


def _corners(box: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _assign(cost: NDArray[np.float32], counts: Sequence[int]) -> NDArray[np.int64]:
    """(Lyr, T) query indices, -1 for none, from cost (T, Lyr, N); one problem per layer and image."""
    targets, layers, _ = cost.shape
    stops = np.cumsum(counts)
    problems = [
        (layer, int(stop) - count, int(stop))
        for count, stop in zip(counts, stops, strict=True)
        for layer in range(layers)
        if count
    ]
    result = np.full((layers, targets), -1, np.int64)

    def solve(first: int, last: int) -> None:
        for layer, start, stop in problems[first:last]:
            matched, query = linear_sum_assignment(cost[start:stop, layer])
            result[layer, start + matched] = query

    if cost.size < CELLS_WORTH_THREADS:
        solve(0, len(problems))
    else:
        in_threads(solve, len(problems))
    return result
