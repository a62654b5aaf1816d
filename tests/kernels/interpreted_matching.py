"""The Triton matcher in Triton's interpreter; run by test_triton_interpreted.py, which sets TRITON_INTERPRET=1 before
triton is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels.matching.op import BROKEN_COST, match
from kernels.matching.reference import matching_cost
from kernels.matching.triton_assignment import assign, match_on_device
from kernels.matching.triton_cost import Costs, matching_costs

WEIGHTS: dict[str, float] = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}


def draw(counts: list[int], layers: int = 2, queries: int = 20, classes: int = 7, seed: int = 0) -> tuple[Any, ...]:
    source = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        return torch.rand(*shape, 4, generator=source) * 0.4 + 0.05

    images, targets = len(counts), sum(counts)
    return (
        torch.randn(layers, images, queries, classes, generator=source),
        boxes(layers, images, queries),
        torch.randint(classes, (targets,), generator=source),
        boxes(targets),
        counts,
    )


def check_assignment(matrix: np.ndarray) -> None:
    """Distinct columns at scipy's optimum, for one problem (rows, columns)."""
    cost = torch.from_numpy(matrix.astype(np.float32))[None]
    minimum, cheapest = cost.min(-1)
    starts = torch.tensor([0, cost.shape[1]], dtype=torch.int32)
    chosen = assign(Costs(cost, minimum, cheapest.int()), starts)[0].numpy()
    assert len(set(chosen.tolist())) == cost.shape[1] and (chosen >= 0).all() and (chosen < cost.shape[2]).all()
    exact = cost[0].double().numpy()
    best = exact[linear_sum_assignment(exact)].sum()
    assert exact[np.arange(len(chosen)), chosen].sum() == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    "kind", ["random", "few values", "rounded", "repeated columns", "constant", "huge", "near rank one", "same rows"]
)
def test_assignment_costs_as_little_as_scipys(kind: str) -> None:
    source = np.random.default_rng(sum(map(ord, kind)))
    for _ in range(8):
        rows = int(source.integers(1, 15))
        columns = int(source.integers(rows, 30))
        matrix = {
            "random": source.random((rows, columns)),
            "few values": source.integers(0, 3, (rows, columns)),
            "rounded": np.round(source.normal(size=(rows, columns)), 1),
            "repeated columns": np.repeat(source.random((rows, columns)), 3, 1),
            "constant": np.zeros((rows, columns)),
            "huge": -source.random((rows, columns)) * 1e6,
            "near rank one": source.random((rows, 1)) * source.random((1, columns)) + 1e-4 * source.random((rows, 1)),
            "same rows": np.repeat(source.random((1, columns)), rows, 0),
        }[kind]
        check_assignment(matrix)


@pytest.mark.parametrize("rows", [1, 9, 16])
def test_as_many_rows_as_columns(rows: int) -> None:
    check_assignment(np.random.default_rng(rows).random((rows, rows)))


def test_more_rows_than_are_read_at_once() -> None:
    check_assignment(np.random.default_rng(0).random((70, 200)))


def test_as_many_targets_as_the_densest_images_of_objects365() -> None:
    check_assignment(np.random.default_rng(1).random((300, 900)))


@pytest.mark.slow
def test_many_targets_and_collapsed_predictions() -> None:
    """Nearly the same costs for all 900 queries: the longest paths, and hundreds of steps for most targets."""
    source = np.random.default_rng(1)
    check_assignment(source.random((100, 1)) + source.random((1, 900)) + 1e-3 * source.random((100, 900)))


def test_every_index_and_cost_is_written() -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    arguments = draw([5, 0, 9])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        chosen = match_on_device(*arguments, **WEIGHTS, broken_cost=BROKEN_COST)
        image = torch.tensor([0] * 5 + [2] * 9, dtype=torch.int32)
        costs = matching_costs(*arguments[:4], image, **WEIGHTS, broken_cost=BROKEN_COST)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(chosen, match(*arguments, **WEIGHTS))
    assert costs.matrix.isfinite().all() and torch.equal(costs.minimum, costs.matrix.amin(-1))
    assert torch.equal(costs.cheapest.long(), costs.matrix.argmin(-1))


@pytest.mark.parametrize("counts", [[5, 2, 9], [1], [0, 3, 0], [20, 1]])
def test_equals_the_matcher_of_the_cpu(counts: list[int]) -> None:
    arguments = draw(counts)
    expected = match(*arguments, **WEIGHTS)
    assert torch.equal(match_on_device(*arguments, **WEIGHTS, broken_cost=BROKEN_COST), expected)


def test_costs_equal_the_reference() -> None:
    logits, boxes, labels, target_boxes, _ = draw([4, 0, 3], queries=11)
    image = torch.tensor([0] * 4 + [2] * 3, dtype=torch.int32)
    costs = matching_costs(logits, boxes, labels, target_boxes, image, **WEIGHTS, broken_cost=BROKEN_COST)
    for layer in range(2):
        for target in range(7):
            expected = matching_cost(
                logits[layer, image[target]],
                boxes[layer, image[target]],
                labels[target : target + 1],
                target_boxes[target : target + 1],
                **WEIGHTS,
            )[:, 0]
            assert torch.allclose(costs.matrix[layer, target], expected, rtol=0, atol=5e-6)
    assert torch.equal(costs.minimum, costs.matrix.amin(-1))
    assert torch.equal(costs.cheapest.long(), costs.matrix.argmin(-1))


def test_ties_duplicates_and_collapsed_predictions() -> None:
    logits, boxes, labels, target_boxes, counts = draw([8, 6], queries=12)
    constant = torch.zeros_like(logits), boxes[:, :, :1].expand_as(boxes)
    same = labels[:1].expand(14), target_boxes[:1].expand(14, 4)
    near = logits[:, :, :1] + 1e-4 * torch.randn_like(logits), boxes[:, :, :1] + 1e-4 * torch.randn_like(boxes)
    for problem in (
        (logits, boxes, *same),
        (*constant, labels, target_boxes),
        (*constant, *same),
        (*near, labels, target_boxes),
    ):
        first = match_on_device(*problem, counts, **WEIGHTS, broken_cost=BROKEN_COST)
        assert torch.equal(match_on_device(*problem, counts, **WEIGHTS, broken_cost=BROKEN_COST), first)
        by_scipy = match(*problem, counts, **WEIGHTS)
        assert total_cost(problem, counts, first) == pytest.approx(total_cost(problem, counts, by_scipy), abs=1e-4)
        for part in first.split(counts, 1):
            assert all(len(set(row.tolist())) == part.shape[1] for row in part)


def total_cost(problem: tuple[Tensor, ...], counts: list[int], chosen: Tensor) -> float:
    logits, boxes, labels, target_boxes = problem
    total, stop = 0.0, 0
    for image, count in enumerate(counts):
        start, stop = stop, stop + count
        for layer in range(logits.shape[0]):
            part = labels[start:stop], target_boxes[start:stop]
            cost = matching_cost(logits[layer, image], boxes[layer, image], *part, **WEIGHTS)
            total += float(cost[chosen[layer, start:stop], torch.arange(count)].sum())
    return total


def test_broken_predictions_are_matched_last() -> None:
    logits, boxes, labels, target_boxes, counts = draw([4, 3], queries=8)
    logits[:, :, 0], boxes[:, :, 1], boxes[:, :, 2] = float("nan"), float("nan"), float("inf")
    chosen = match_on_device(logits, boxes, labels, target_boxes, counts, **WEIGHTS, broken_cost=BROKEN_COST)
    assert chosen.min() >= 3
    broken = torch.full_like(logits, float("nan"))
    everything = match_on_device(broken, boxes, labels, target_boxes, counts, **WEIGHTS, broken_cost=BROKEN_COST)
    assert all(len(set(row[:4].tolist())) == 4 for row in everything)


def test_takes_bfloat16_and_strided_inputs() -> None:
    logits, boxes, labels, target_boxes, counts = draw([5, 2])
    narrow = logits.bfloat16()
    strided = narrow.transpose(0, 3).contiguous().transpose(0, 3)
    chosen = match_on_device(strided, boxes, labels, target_boxes, counts, **WEIGHTS, broken_cost=BROKEN_COST)
    assert torch.equal(chosen, match(narrow, boxes, labels, target_boxes, counts, **WEIGHTS))
