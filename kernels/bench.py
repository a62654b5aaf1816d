"""Times of the kernels of this package beside the usual ways to compute the same, as rows of a table."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.bench_cases import NAME, SWEEP, Case, Layer, attention_case, matching_case
from kernels.bench_official import attention_by_grid_sample, match_whole_batch
from kernels.bench_peers import installed, peers
from kernels.bench_timing import Row, failure, least_times, rows
from kernels.deform_attn import deform_attn
from kernels.matching import match

WEIGHTS: dict[str, Any] = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}
WINDOWED = "triton windowed"


def measure(device: str, turns: int, only: str = "") -> Iterator[Row]:
    """All comparisons, one after the other; only: those whose "what, dtype, passes" contains this text.

    Raises ValueError for a device that is not here, and where nothing is left, before the first.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench kernels: --device cuda needs a CUDA device, and torch sees none; use --device cpu")
    found = [(title, run) for title, run in _comparisons(torch.device(device), turns) if only in title]
    if not found:
        titles = "; ".join(title for title, _ in _comparisons(torch.device(device), turns))
        raise ValueError(f"bench kernels: --only '{only}' is in none of the comparisons: {titles}")
    return itertools.chain.from_iterable(run() for _, run in found)


def _comparisons(device: torch.device, turns: int) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    for layer in SWEEP[device.type]:
        for dtype in NAME:
            for passes in ("forward", "forward + backward"):
                run = functools.partial(_compare_attention, layer, dtype, passes, device, turns)
                yield f"{layer.name}, {NAME[dtype]}, {passes}", run
    for boxes, collapsed in ((10, False), (50, False), (200, False), (50, True)):
        what = f"matching 7 x 8 problems, {boxes} boxes" + (", collapsed predictions" if collapsed else "")
        run = functools.partial(_compare_matching, what, boxes, collapsed, device, turns)
        yield f"{what}, fp32, forward", run
    if device.type == "cuda":
        from kernels.bench_atomics import measure_atomics
        from kernels.bench_launch import measure_launch_shapes

        yield "atomic additions, fp32, forward", functools.partial(measure_atomics, device, turns)
        for layer in SWEEP["cuda"][1:]:
            for dtype in NAME:
                what = f"launch shapes of the {layer.name}, {NAME[dtype]}"
                yield what, functools.partial(measure_launch_shapes, what, layer, dtype, device, turns)


def _compare_attention(
    layer: Layer, dtype: torch.dtype, passes: str, device: torch.device, turns: int
) -> Iterator[Row]:
    case, backward = attention_case(layer, dtype, device), "backward" in passes
    ways: dict[str, Callable[..., Tensor]] = {"grid_sample": attention_by_grid_sample}
    if device.type == "cuda":
        ways["grid_sample compiled"] = torch.compile(attention_by_grid_sample)
        for name, (module, way) in peers().items():
            problem = "" if installed(module) else "not installed"
            problem = problem or failure(functools.partial(_attend, way, case, layer.level_shapes, backward))
            if problem:
                yield Row(layer.name, NAME[dtype], passes, f"{name} ({problem})")
            else:
                ways[name] = way
    ways["triton" if device.type == "cuda" else "numba"] = deform_attn
    if device.type == "cuda" and not layer.queries:
        ways[WINDOWED] = functools.partial(deform_attn, impl="triton_windowed")
    runs = {name: functools.partial(_attend, way, case, layer.level_shapes, backward) for name, way in ways.items()}
    yield from rows(layer.name, NAME[dtype], passes, least_times(runs, device, turns))


def _attend(way: Callable[..., Tensor], case: Case, level_shapes: Any, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output = way(*case, level_shapes)
    if backward:
        torch.autograd.grad(output, case[:3], torch.ones_like(output))


def _compare_matching(what: str, boxes: int, collapsed: bool, device: torch.device, turns: int) -> Iterator[Row]:
    arguments = matching_case(boxes, collapsed, device)
    runs: dict[str, Callable[[], object]] = {
        "whole batch": functools.partial(match_whole_batch, *arguments, **WEIGHTS),
        "triton" if device.type == "cuda" else "per image": functools.partial(match, *arguments, **WEIGHTS),
    }
    yield from rows(what, "fp32", "forward", least_times(runs, device, turns))
