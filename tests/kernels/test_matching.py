"""Matching against scipy on dense problems, against the official recording, and its behaviour on hard inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.matching import match, op
from kernels.matching.reference import match_reference, matching_cost

DATA = Path(__file__).parents[1] / "data"
WEIGHTS: dict[str, float] = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}


def draw(counts: list[int], layers: int = 3, queries: int = 20, classes: int = 7, seed: int = 0) -> tuple[Any, ...]:
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


def check_optimal(arguments: tuple[Any, ...], **weights: float) -> Tensor:
    """Valid (distinct queries inside every image) and as cheap as scipy's optimum of each dense problem."""
    weights = {**WEIGHTS, **weights}
    logits, boxes, labels, target_boxes, counts = arguments
    chosen = match(*arguments, **weights)
    assert chosen.shape == (logits.shape[0], labels.shape[0]) and chosen.dtype == torch.int64
    for layer in range(logits.shape[0]):
        stop = 0
        for image, count in enumerate(counts):
            start, stop = stop, stop + count
            queries = chosen[layer, start:stop]
            (matched,) = np.nonzero(queries.numpy() >= 0)
            assert len(set(queries[matched].tolist())) == len(matched) == min(count, logits.shape[2])
            assert bool((queries[queries < 0] == -1).all())
            if count == 0:
                continue
            assert int(queries.max()) < logits.shape[2]
            cost = matching_cost(
                logits[layer, image], boxes[layer, image], labels[start:stop], target_boxes[start:stop], **weights
            ).numpy()
            best = cost[linear_sum_assignment(cost)].sum()
            assert cost[queries.numpy()[matched], matched].sum() == pytest.approx(best, rel=1e-5, abs=1e-4)
    return chosen


@pytest.mark.parametrize("counts", [[5, 2, 9], [1], [0, 3, 0], [20, 1], [0, 0]])
@pytest.mark.parametrize("seed", range(4))
def test_is_optimal(counts: list[int], seed: int) -> None:
    arguments = draw(counts, seed=seed)
    chosen = check_optimal(arguments)
    assert torch.equal(chosen, match_reference(*arguments, **WEIGHTS))


@pytest.mark.parametrize("counts", [[12, 3], [0, 30], [9, 9, 8], [8, 7]])
def test_more_targets_than_queries_leave_the_dearest_out(counts: list[int]) -> None:
    arguments = draw(counts, queries=8)
    chosen = check_optimal(arguments)
    assert torch.equal(chosen, match_reference(*arguments, **WEIGHTS))
    assert int((chosen[0] < 0).sum()) == sum(max(0, count - 8) for count in counts)


def test_weights_are_used() -> None:
    arguments = draw([6, 4])
    for only in ("class_cost", "box_cost", "giou_cost"):
        weights = {name: float(name == only) for name in ("class_cost", "box_cost", "giou_cost")}
        assert torch.equal(check_optimal(arguments, **weights), match_reference(*arguments, **weights, alpha=0.25))
    changed = check_optimal(arguments, class_cost=20.0, alpha=0.9)
    assert not torch.equal(changed, match(*arguments, **WEIGHTS))


def test_ties_and_duplicates_are_solved_and_repeatable() -> None:
    logits, boxes, labels, target_boxes, counts = draw([8, 8], queries=12)
    same_targets = labels[:1].expand(16), target_boxes[:1].expand(16, 4)
    constant = torch.zeros_like(logits), boxes[:, :, :1].expand_as(boxes)
    for problem in (
        (logits, boxes, *same_targets, counts),
        (*constant, labels, target_boxes, counts),
        (*constant, *same_targets, counts),
    ):
        first = check_optimal(problem)
        assert all(torch.equal(match(*problem, **WEIGHTS), first) for _ in range(3))


def test_collapsed_predictions_are_solved() -> None:
    """Early in training all queries predict nearly the same: the hardest problems for an assignment solver."""
    logits, boxes, labels, target_boxes, counts = draw([40, 25], queries=60)
    near = boxes[:, :, :1] + 1e-4 * torch.randn_like(boxes)
    check_optimal((logits[:, :, :1] + 1e-4 * torch.randn_like(logits), near, labels, target_boxes, counts))


def test_broken_predictions_are_matched_last() -> None:
    logits, boxes, labels, target_boxes, counts = draw([4, 3], queries=8)
    logits[:, :, 0], boxes[:, :, 1], boxes[:, :, 2] = float("nan"), float("nan"), float("inf")
    chosen = match(logits, boxes, labels, target_boxes, counts, **WEIGHTS)
    assert chosen.min() >= 3
    everything = match(torch.full_like(logits, float("nan")), boxes, labels, target_boxes, counts, **WEIGHTS)
    assert all(len(set(row[:4].tolist())) == 4 for row in everything)


def test_images_and_layers_do_not_see_each_other() -> None:
    logits, boxes, labels, target_boxes, counts = draw([5, 0, 7])
    together = match(logits, boxes, labels, target_boxes, counts, **WEIGHTS)
    alone = match(logits[1:2, 2:], boxes[1:2, 2:], labels[5:], target_boxes[5:], [7], **WEIGHTS)
    assert torch.equal(together[1:2, 5:], alone)


def test_order_of_targets_only_permutes_the_result() -> None:
    logits, boxes, labels, target_boxes, counts = draw([9], seed=5)
    order = torch.randperm(9)
    shuffled = match(logits, boxes, labels[order], target_boxes[order], counts, **WEIGHTS)
    assert torch.equal(shuffled, match(logits, boxes, labels, target_boxes, counts, **WEIGHTS)[:, order])


def test_large_step_in_threads_and_pieces_equals_the_reference() -> None:
    """More cells than one piece of cost and than the limit for threads."""
    arguments = draw([90, 0, 120, 40], layers=5, queries=900, classes=11)
    assert 250 * 5 * 900 > op.CELLS_WORTH_THREADS > op.CELLS_IN_CACHE
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(match(*arguments, **WEIGHTS))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], match_reference(*arguments, **WEIGHTS))


def test_takes_bfloat16_and_tensors_that_need_gradients() -> None:
    logits, boxes, labels, target_boxes, counts = draw([5, 2])
    half, needy = logits.bfloat16().requires_grad_(), boxes.requires_grad_()
    chosen = match(half, needy, labels, target_boxes, counts, **WEIGHTS)
    exact = match(half.detach().float(), boxes.detach(), labels, target_boxes, counts, **WEIGHTS)
    assert torch.equal(chosen, exact) and not chosen.requires_grad


def test_impossible_arguments_are_named() -> None:
    logits, boxes, labels, target_boxes, counts = draw([3, 5])
    with pytest.raises(ValueError, match=r"counts \[3, 4\] must have one entry per image \(2\) and sum .* \(8\)"):
        match(logits, boxes, labels, target_boxes, [3, 4], **WEIGHTS)
    with pytest.raises(ValueError, match="expected labels"):
        match(logits, boxes, labels[:, None], target_boxes, counts, **WEIGHTS)
    with pytest.raises(ValueError, match="expected logits"):
        match(logits[0], boxes, labels, target_boxes, counts, **WEIGHTS)


def test_equals_the_official_recording() -> None:
    components = np.load(DATA / "goldens" / "components.npz")
    recorded = {
        key.removeprefix("match."): torch.from_numpy(components[key])
        for key in components.files
        if key.startswith("match.")
    }
    for image in (0, 1):
        labels, target_boxes = recorded[f"t{image}.labels"], recorded[f"t{image}.boxes"]
        cost = matching_cost(recorded["logits"][image], recorded["boxes"][image], labels, target_boxes, **WEIGHTS)
        assert torch.allclose(cost, recorded[f"cost{image}"], rtol=0, atol=2e-6)
    chosen = match(
        recorded["logits"][None],
        recorded["boxes"][None],
        torch.cat([recorded["t0.labels"], recorded["t1.labels"]]),
        torch.cat([recorded["t0.boxes"], recorded["t1.boxes"]]),
        [6, 3],
        **WEIGHTS,
    )
    for part, name in zip(chosen[0].split([6, 3]), ("idx0", "idx1"), strict=True):
        queries, targets = recorded[name]
        assert torch.equal(part[targets], queries)


def test_registration_passes_opcheck() -> None:
    logits, boxes, labels, target_boxes, counts = draw([5, 0, 3])
    arguments = (logits, boxes, labels, target_boxes, counts, *WEIGHTS.values())
    torch.library.opcheck(op._match, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    """As in the criterion: what is matched decides what is learnt, and gradients go around the matching."""

    def loss(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, counts: list[int]) -> Tensor:
        chosen = match(logits.detach(), boxes, labels, target_boxes, counts, **WEIGHTS)
        return (logits.sigmoid().sum(-1).flatten(1).gather(1, chosen) ** 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for counts in ([5, 3], [4, 6]):
        logits, boxes, labels, target_boxes, _ = draw(counts)
        logits.requires_grad_()
        (expected,) = torch.autograd.grad(loss(logits, boxes, labels, target_boxes, counts), logits)
        (actual,) = torch.autograd.grad(compiled(logits, boxes, labels, target_boxes, counts), logits)
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_checkpointing_gives_the_same_gradients() -> None:
    """The matching runs again in the backward pass and must choose the same."""

    def loss(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        chosen = match(logits.detach(), boxes, labels, target_boxes, [5, 3], **WEIGHTS)
        return (logits.sigmoid().sum(-1).flatten(1).gather(1, chosen) ** 2).sum()

    logits, boxes, labels, target_boxes, _ = draw([5, 3])
    logits.requires_grad_()
    arguments = (logits, boxes, labels, target_boxes)
    (plain,) = torch.autograd.grad(loss(*arguments), logits)
    (saved,) = torch.autograd.grad(checkpoint(loss, *arguments, use_reentrant=False), logits)
    assert torch.equal(saved, plain) and plain.count_nonzero() > 0


def test_takes_what_autocast_gives() -> None:
    """Logits of a projection under autocast are bfloat16; the costs are float32 whatever autocast says."""
    torch.manual_seed(0)
    to_logits, queries = torch.nn.Linear(16, 7), torch.randn(3, 2, 20, 16)
    _, boxes, labels, target_boxes, counts = draw([5, 3])
    with torch.autocast("cpu", torch.bfloat16):
        logits = to_logits(queries)
        chosen = match(logits, boxes, labels, target_boxes, counts, **WEIGHTS)
    assert logits.dtype == torch.bfloat16 and not chosen.requires_grad
    assert torch.equal(chosen, match(logits.float(), boxes, labels, target_boxes, counts, **WEIGHTS))


class Matcher(torch.nn.Module):
    def forward(self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        return match(logits * 2, boxes, labels, target_boxes, [5, 3], **WEIGHTS)


def test_exports_as_one_node_for_any_number_of_queries() -> None:
    queries = torch.export.Dim("queries", min=8, max=100)
    *arguments, _ = draw([5, 3])
    program = torch.export.export(Matcher(), tuple(arguments), dynamic_shapes=({2: queries}, {2: queries}, None, None))
    # Under no_grad, which export keeps as a graph of its own inside the graph.
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert len([target for target in targets if "dino_scale.match" in target]) == 1
    for number in (20, 31):
        *arguments, _ = draw([5, 3], queries=number)
        assert torch.equal(program.module()(*arguments), Matcher()(*arguments))


def test_every_index_is_written() -> None:
    """In deterministic mode torch fills new memory with the largest integer or NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        arguments = draw([5, 2, 9])
        assert torch.equal(match(*arguments, **WEIGHTS), match_reference(*arguments, **WEIGHTS))
    finally:
        torch.use_deterministic_algorithms(False)
