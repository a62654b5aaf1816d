"""Exact linear assignment on the GPU: one program per (layer, image), all of them at once, nothing sent to the host.

Shortest augmenting paths (Jonker and Volgenant, 1987; Crouse, 2016) with the queries as one vector in registers.
Rows are targets, columns are queries. Start: every row claims its cheapest column and the lowest row gets it, which is
feasible with the row minima as row potentials; where predictions are half trained this already solves nearly all. Every
row left over is then given a column along the cheapest path through columns already taken (Dijkstra over columns).

Sums are float64 over float32 costs, and every choice among equals is the lowest index: the optimum, repeatably.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.matching.triton_cost import Costs, matching_costs
from kernels.transfer import to_device

ROWS_AT_ONCE = 64
COLUMNS_PER_WARP = 128


@torch.no_grad()
def match_on_device(
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
    broken_cost: float,
) -> Tensor:
    """`match` with at least one target, arguments checked; the host is never waited for."""
    image, starts = _layout(counts, logits.device)
    costs = matching_costs(
        logits,
        boxes,
        labels,
        target_boxes,
        image,
        class_cost=class_cost,
        box_cost=box_cost,
        giou_cost=giou_cost,
        alpha=alpha,
        broken_cost=broken_cost,
    )
    return assign(costs, starts)


def assign(costs: Costs, starts: Tensor) -> Tensor:
    """The cheapest distinct columns, (Lyr, T) int64. starts: (B + 1,) int32, first row of every image and the end."""
    layers, targets, queries = costs.matrix.shape
    images = starts.shape[0] - 1
    device = costs.matrix.device
    column_of_row = torch.empty((layers, targets), dtype=torch.int64, device=device)
    row_of_column = torch.empty((layers * images, queries), dtype=torch.int32, device=device)
    potential = torch.empty((layers, targets), dtype=torch.float64, device=device)
    block = triton.next_power_of_2(queries)
    assignment_kernel[(layers * images,)](
        *costs,
        starts,
        potential,
        column_of_row,
        row_of_column,
        images,
        queries,
        targets,
        BLOCK=block,
        ROWS=ROWS_AT_ONCE,
        num_warps=min(8, max(1, block // COLUMNS_PER_WARP)),
    )
    return column_of_row


def _layout(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image of every target (T,), and first target of every image with the end (B + 1,), int32, in one copy."""
    per_image = torch.tensor(list(counts))
    image = torch.repeat_interleave(torch.arange(len(counts)), per_image)
    starts = torch.cat([per_image.new_zeros(1), per_image.cumsum(0)])
    both = torch.cat([image, starts]).int()
    on_device = to_device(both, device).split([image.shape[0], starts.shape[0]])
    # A copy, so that the second part is aligned like every other argument and no kernel is compiled for it alone.
    return on_device[0], on_device[1].clone()


@triton.jit
def _claim_cheapest(minimum, cheapest, potential, column_of_row, owners, first, rows, ROWS: tl.constexpr):
    """Every row takes its cheapest column if no lower row wants it; owners must hold the largest integer."""
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        known = row < rows
        column = tl.load(cheapest + first + row, mask=known, other=0)
        tl.atomic_min(owners + column, row, mask=known, sem="relaxed")
        tl.store(potential + first + row, tl.load(minimum + first + row, mask=known, other=0.0), mask=known)
    tl.debug_barrier()
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        known = row < rows
        column = tl.load(cheapest + first + row, mask=known, other=0)
        owner = tl.load(owners + column, mask=known, other=0)
        tl.store(column_of_row + first + row, tl.where(owner == row, column, -1), mask=known)
    tl.debug_barrier()


@triton.jit
def _shortest_path(costs, potential, current, first, queries, row_of, column_potential, BLOCK: tl.constexpr):
    """Dijkstra from a free row to the nearest free column: that column, its distance, the distance of every column,
    the row before every column on its path, and the columns visited."""
    column = tl.arange(0, BLOCK)
    known = column < queries
    distance = tl.full([BLOCK], float("inf"), tl.float64)
    before = tl.full([BLOCK], -1, tl.int32)
    visited = column < 0
    row, end = current, -1
    reached = tl.zeros([], tl.float64)
    while end < 0:
        own = tl.load(potential + first + row)
        cost = tl.load(costs + (first + row) * queries + column, mask=known, other=float("inf")).to(tl.float64)
        through = reached + (cost - own - column_potential)
        shorter = known & (visited == 0) & (through < distance)
        distance = tl.where(shorter, through, distance)
        before = tl.where(shorter, row, before)
        open_distance = tl.where(known & (visited == 0), distance, float("inf"))
        reached = tl.min(open_distance, 0)
        # Among the nearest columns a free one ends the search at once; then the lowest number.
        rank = tl.where(row_of < 0, column, column + BLOCK)
        best = tl.min(tl.where(known & (visited == 0) & (open_distance == reached), rank, 2 * BLOCK), 0)
        chosen = best % BLOCK
        visited = visited | (column == chosen)
        if best < BLOCK:
            end = chosen
        else:
            row = tl.sum(tl.where(column == chosen, row_of, 0), 0)
    return end, reached, distance, before, visited


@triton.jit(do_not_specialize=["images", "queries", "targets"])
def assignment_kernel(
    costs,
    minimum,
    cheapest,
    starts,
    potential,
    column_of_row,
    row_of_column,
    images,
    queries,
    targets,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    problem = tl.program_id(0)
    image = problem % images
    start = tl.load(starts + image)
    rows = tl.load(starts + image + 1) - start
    first = (problem // images).to(tl.int64) * targets + start
    column = tl.arange(0, BLOCK)
    known = column < queries
    NOBODY: tl.constexpr = 2147483647
    owners = row_of_column + problem.to(tl.int64) * queries
    tl.store(owners + column, tl.full([BLOCK], NOBODY, tl.int32), mask=known)
    tl.debug_barrier()
    _claim_cheapest(minimum, cheapest, potential, column_of_row, owners, first, rows, ROWS)
    row_of = tl.load(owners + column, mask=known, other=NOBODY)
    row_of = tl.where(row_of == NOBODY, -1, row_of)
    column_potential = tl.zeros([BLOCK], tl.float64)
    for current in range(rows):
        if tl.load(column_of_row + first + current) < 0:
            end, reached, distance, before, visited = _shortest_path(
                costs, potential, current, first, queries, row_of, column_potential, BLOCK
            )
            # Potentials of the rows that own a visited column, of those columns, and of the row just placed.
            owned = visited & (row_of >= 0)
            old = tl.load(potential + first + row_of, mask=owned, other=0.0)
            tl.store(potential + first + row_of, old + (reached - distance), mask=owned)
            tl.store(potential + first + current, tl.load(potential + first + current) + reached)
            column_potential = tl.where(visited, column_potential - (reached - distance), column_potential)
            # Walk the path back: every row on it takes the column after it and frees its own for the row before.
            place, going = end, 1
            while going > 0:
                row = tl.sum(tl.where(column == place, before, 0), 0)
                row_of = tl.where(column == place, row, row_of)
                freed = tl.load(column_of_row + first + row).to(tl.int32)
                tl.debug_barrier()
                tl.store(column_of_row + first + row, place)
                place = freed
                going = tl.where(row == current, 0, 1)
            tl.debug_barrier()
