"""Times of the kernels of this package beside the usual ways to compute the same, as rows of a table.

Contenders of one comparison take turns, and the least time of each counts: what else runs on the machine then hits all
of them alike, and the ratios stay when the times move. The first turn, which compiles, is not counted.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.bench_official import attention_by_grid_sample, match_whole_batch
from kernels.bench_peers import installed, peers
from kernels.deform_attn import deform_attn
from kernels.matching import match

Case = tuple[Tensor, Tensor, Tensor, Tensor]
NAME = {torch.float32: "fp32", torch.bfloat16: "bf16"}
WEIGHTS: dict[str, Any] = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}
LAYERS, QUERIES, CLASSES = 7, 900, 91


@dataclass(frozen=True)
class Layer:
    """queries 0: one per token, as in the encoder; otherwise boxes are the references, as in the decoder."""

    name: str
    level_shapes: tuple[tuple[int, int], ...]
    batch: int
    queries: int


SQUARE = ((80, 80), (40, 40), (20, 20), (10, 10))
COCO = ((100, 167), (50, 84), (25, 42), (13, 21))
SWEEP = {
    "cpu": (Layer("encoder 640x640", SQUARE, 1, 0), Layer("decoder 640x640, 1100 queries", SQUARE, 1, 1100)),
    "cuda": (
        Layer("encoder 640x640", SQUARE, 2, 0),
        Layer("encoder 800x1333", COCO, 2, 0),
        Layer("decoder 800x1333, 1100 queries", COCO, 2, 1100),
    ),
}


@dataclass(frozen=True)
class Row:
    """One contender of one comparison. ratio: how many times faster than the usual way it is. NaN: not measured."""

    what: str
    dtype: str
    passes: str
    implementation: str
    milliseconds: float
    ratio: float


def measure(device: str, turns: int) -> Iterator[Row]:
    """All comparisons, one after the other. Raises ValueError for a device that is not here, before the first."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench kernels: --device cuda needs a CUDA device, and torch sees none; use --device cpu")
    return _measure(device, turns)


def _measure(device: str, turns: int) -> Iterator[Row]:
    for layer in SWEEP[device]:
        for dtype in NAME:
            for backward in (False, True):
                yield from _compare_attention(layer, dtype, backward, torch.device(device), turns)
    for boxes in (10, 50, 200):
        yield from _compare_matching(boxes, torch.device(device), turns)


def _compare_attention(
    layer: Layer, dtype: torch.dtype, backward: bool, device: torch.device, turns: int
) -> Iterator[Row]:
    case = attention_case(layer, dtype, device)
    ways: dict[str, Callable[..., Tensor]] = {"grid_sample": attention_by_grid_sample}
    passes = "forward + backward" if backward else "forward"
    if device.type == "cuda":
        ways["grid_sample compiled"] = torch.compile(attention_by_grid_sample)
        for name, (module, way) in peers().items():
            problem = "" if installed(module) else "not installed"
            problem = problem or _failure(functools.partial(_attend, way, case, layer.level_shapes, backward))
            if problem:
                yield Row(layer.name, NAME[dtype], passes, f"{name} ({problem})", math.nan, math.nan)
            else:
                ways[name] = way
    ways["triton" if device.type == "cuda" else "numba"] = deform_attn
    runs = {name: functools.partial(_attend, way, case, layer.level_shapes, backward) for name, way in ways.items()}
    yield from _rows(layer.name, NAME[dtype], passes, _least_times(runs, device, turns))


def _failure(run: Callable[[], object]) -> str:
    """Why it cannot be measured, "" if it can: a peer built for something else shall not end the comparison."""
    try:
        run()
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def attention_case(layer: Layer, dtype: torch.dtype, device: torch.device) -> Case:
    """Eight heads of 32 channels and four points; offsets of two pixels, about where training puts them."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in layer.level_shapes)
    levels, queries = len(layer.level_shapes), layer.queries or tokens
    offsets = torch.randn(layer.batch, queries, 8, levels, 4, 2, generator=draw) * 2
    if layer.queries:
        sizes = torch.rand(layer.batch, queries, 1, 2, generator=draw) * 0.3 + 0.05
        references = torch.cat([torch.rand(layer.batch, queries, 1, 2, generator=draw), sizes], -1)
    else:
        references = _pixel_centres(layer.level_shapes)[None, :, None].expand(layer.batch, -1, -1, -1)
    value = torch.randn(layer.batch, tokens, 8, 32, generator=draw)
    logits = torch.randn(layer.batch, queries, 8, levels * 4, generator=draw)
    learnt = [tensor.to(device, dtype).requires_grad_() for tensor in (value, offsets, logits)]
    return learnt[0], learnt[1], learnt[2], references.expand(-1, -1, levels, -1).contiguous().to(device)


def _pixel_centres(level_shapes: tuple[tuple[int, int], ...]) -> Tensor:
    centres = []
    for height, width in level_shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(centres)


def _attend(way: Callable[..., Tensor], case: Case, level_shapes: Any, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output = way(*case, level_shapes)
    if backward:
        torch.autograd.grad(output, case[:3], torch.ones_like(output))


def _compare_matching(boxes: int, device: torch.device, turns: int) -> Iterator[Row]:
    """Seven layers of eight images with `boxes` targets each."""
    draw, images = torch.Generator().manual_seed(0), 8
    logits = torch.randn(LAYERS, images, QUERIES, CLASSES, generator=draw).to(device)
    predicted = (torch.rand(LAYERS, images, QUERIES, 4, generator=draw) * 0.4 + 0.1).to(device)
    labels = torch.randint(CLASSES, (images * boxes,), generator=draw).to(device)
    targets = (torch.rand(images * boxes, 4, generator=draw) * 0.4 + 0.1).to(device)
    arguments = (logits, predicted, labels, targets, [boxes] * images)
    runs: dict[str, Callable[[], object]] = {
        "whole batch": functools.partial(match_whole_batch, *arguments, **WEIGHTS),
        "triton" if device.type == "cuda" else "per image": functools.partial(match, *arguments, **WEIGHTS),
    }
    yield from _rows(f"matching 7 x 8 problems, {boxes} boxes", "fp32", "forward", _least_times(runs, device, turns))


def _rows(what: str, dtype: str, passes: str, seconds: Mapping[str, float]) -> Iterator[Row]:
    """The first contender is the usual way."""
    usual = next(iter(seconds.values()))
    for name, taken in seconds.items():
        yield Row(what, dtype, passes, name, taken * 1e3, usual / taken)


def _least_times(runs: Mapping[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, float]:
    least = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
