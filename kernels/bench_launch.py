"""Times of one kernel under several launch shapes, of which the fastest may go into `tuning.TIMED`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from kernels.bench_cases import NAME, Layer, attention_case
from kernels.bench_timing import Row, failure, least_times, rows
from kernels.deform_attn import triton_backward, triton_forward
from kernels.deform_attn.tuning import TIMED, Direction, LaunchShape, rule

Key = tuple[Direction, int, int, int, torch.dtype, bool]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def measure_launch_shapes(
    what: str, layer: Layer, dtype: torch.dtype, device: torch.device, turns: int
) -> Iterator[Row]:
    """Both kernels, each alone, first under the rule's shape: the usual way here. One that does not run has a row that
    says so. implementation: the entry for `tuning.TIMED`."""
    value, offsets, logits, references = (tensor.detach() for tensor in attention_case(layer, dtype, device))
    sizes = [size for shape in layer.level_shapes for size in shape]
    levels, points = offsets.shape[3:5]
    arguments = (value, offsets, logits, references, sizes)
    grad = torch.ones((value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3]), dtype=dtype, device=device)
    kernels: dict[Direction, Callable[[], object]] = {
        "forward": functools.partial(triton_forward.forward, *arguments),
        "backward": functools.partial(triton_backward.backward, grad, *arguments),
    }
    for direction in DIRECTIONS:
        key: Key = (direction, value.shape[3], levels, points, dtype, references.shape[3] == 4)
        runs: dict[str, Callable[[], object]] = {}
        for shape in candidates(rule(direction, value.shape[3], levels * points, dtype)):
            run = functools.partial(run_with, key, shape, kernels[direction])
            problem = failure(run)
            if problem:
                yield Row(what, NAME[dtype], direction, f"{entry(key, shape)} ({problem})")
            else:
                runs[entry(key, shape)] = run
        yield from rows(what, NAME[dtype], direction, least_times(runs, device, turns))


def candidates(by_rule: LaunchShape) -> list[LaunchShape]:
    """The rule's shape first; then others: half and twice the queries, more warps, with and without its limit."""
    queries = sorted({max(1, by_rule.queries // 2), by_rule.queries, by_rule.queries * 2})
    others = [LaunchShape(number, warps, by_rule.registers) for number in queries for warps in (1, 2, 4)]
    return [by_rule, *(shape for shape in others if shape != by_rule)]


def entry(key: Key, shape: LaunchShape) -> str:
    """As it is written in `tuning.TIMED`."""
    direction, channels, levels, points, dtype, box = key
    place = f'("{direction}", {channels}, {levels}, {points}, {dtype}, {box})'
    return f"{place}: LaunchShape({shape.queries}, {shape.warps}, {shape.registers})"


def run_with(key: Key, shape: LaunchShape, run: Callable[[], object]) -> None:
    with launched_with(key, shape):
        run()


@contextlib.contextmanager
def launched_with(key: Key, shape: LaunchShape) -> Iterator[None]:
    before = TIMED.get(key)
    TIMED[key] = shape
    try:
        yield
    finally:
        del TIMED[key]
        if before is not None:
            TIMED[key] = before
