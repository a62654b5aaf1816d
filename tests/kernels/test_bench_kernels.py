"""The comparison of kernels: that the contenders compute the same, and what the command writes."""

from __future__ import annotations

import csv
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import bench, bench_peers
from kernels.bench_official import attention_by_grid_sample, match_whole_batch
from kernels.deform_attn import deform_attn
from kernels.matching import match
from launch.cli import main
from launch.commands import bench_kernels

SMALL = (
    bench.Layer("encoder", ((6, 5), (3, 3)), 2, 0),
    bench.Layer("decoder", ((6, 5), (3, 3)), 2, 11),
)


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_attention_contenders_compute_the_same(layer: bench.Layer) -> None:
    case = bench.attention_case(layer, torch.float32, torch.device("cpu"))
    usual, ours = attention_by_grid_sample(*case, layer.level_shapes), deform_attn(*case, layer.level_shapes)
    assert torch.allclose(usual, ours, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(usual)
    expected = torch.autograd.grad(usual, case[:3], grad)
    for usual_gradient, our_gradient in zip(expected, torch.autograd.grad(ours, case[:3], grad), strict=True):
        assert (usual_gradient - our_gradient).norm() < 1e-3 * usual_gradient.norm()


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_arguments_of_msda_triton(layer: bench.Layer) -> None:
    """Evaluated by the definition in its documentation: the sum of weighted bilinear samples, zeros outside."""
    case = bench.attention_case(layer, torch.float32, torch.device("cpu"))
    value, shapes, locations, weights = bench_peers.msda_triton_arguments(*case, layer.level_shapes)
    assert (*value.shape, shapes.tolist()) == (*case[0].shape, [list(shape) for shape in layer.level_shapes])
    assert torch.allclose(weights.sum((-1, -2)), torch.ones(()))
    total = torch.zeros(*case[1].shape[:3], 32)
    maps = value.split(shapes.prod(1).tolist(), 1)
    for level, (height, width) in enumerate(shapes.tolist()):
        for point in range(4):
            sampled = by_definition(maps[level], locations[:, :, :, level, point], height, width)
            total += weights[:, :, :, level, point, None] * sampled
    assert torch.allclose(total.flatten(2), deform_attn(*case, layer.level_shapes), rtol=1e-4, atol=1e-5)


def by_definition(feature_map: Tensor, locations: Tensor, height: int, width: int) -> Tensor:
    """(B, Q, M, D) of (B, S, M, D) at (B, Q, M, 2) in [0, 1], pixel centres at half integers, cell by cell."""
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    shares = [
        (1 - (x - column).abs()).clamp(min=0) * (1 - (y - row).abs()).clamp(min=0)
        for row in range(height)
        for column in range(width)
    ]
    return torch.einsum("sbqm,bsmd->bqmd", torch.stack(shares), feature_map)


def test_samples_of_dcnv4() -> None:
    """The layout that its kernels read: per head L * P pairs x, y, level by level, then L * P raw weights."""
    layer = SMALL[0]
    case = bench.attention_case(layer, torch.float32, torch.device("cpu"))
    joined = bench_peers.dcnv4_samples(*case[1:], layer.level_shapes)
    assert joined.shape == (2, 39, 8, 2 * 4 * 3) and joined.dtype == torch.float16
    image, query, head, level, point = 1, 7, 3, 1, 2
    height, width = layer.level_shapes[level]
    x, y = case[3][image, query, level] + case[1][image, query, head, level, point] / torch.tensor([width, height])
    pair = (level * 4 + point) * 2
    assert joined[image, query, head, pair : pair + 2].tolist() == [x.half().item(), y.half().item()]
    logit = case[2][image, query, head, level * 4 + point]
    assert joined[image, query, head, 2 * 4 * 2 + level * 4 + point] == logit.half()


def test_first_tokens_of_levels() -> None:
    shapes, starts = bench_peers.level_tensors(((6, 5), (3, 3), (2, 1)), torch.device("cpu"))
    assert shapes.tolist() == [[6, 5], [3, 3], [2, 1]] and starts.tolist() == [0, 30, 39]


def test_a_peer_that_is_not_there_is_not_measured() -> None:
    assert not bench_peers.installed("surely_not_installed") and bench_peers.installed("torch")
    layer = SMALL[0]
    case = bench.attention_case(layer, torch.float32, torch.device("cpu"))
    assert set(bench_peers.peers()) == {"official op", "DCNv4 FlashDeformAttn", "msda-triton"}
    failing = functools.partial(bench_peers.attention_by_dcnv4, *case, layer.level_shapes)
    assert bench._failure(failing).startswith("failed: ModuleNotFoundError: No module named 'DCNv4")
    row = bench.Row("encoder", "bf16", "forward", "msda-triton (not installed)", math.nan, math.nan)
    assert bench_kernels._figures(row) == "msda-triton (not installed)" and bench_kernels._numbers(row) == ("", "")


def test_matching_contenders_compute_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 3, 20, 5, generator=draw), torch.rand(2, 3, 20, 4, generator=draw) * 0.4 + 0.1
    labels, targets = torch.randint(5, (9,), generator=draw), torch.rand(9, 4, generator=draw) * 0.4 + 0.1
    ours = match(logits, boxes, labels, targets, [4, 0, 5], **bench.WEIGHTS)
    usual = match_whole_batch(logits, boxes, labels, targets, [4, 0, 5], **bench.WEIGHTS)
    for layer in range(2):
        for image, part in enumerate(ours[layer].split([4, 0, 5])):
            queries, order = usual[layer][image]
            assert part[order].tolist() == list(queries)


def test_command_writes_a_row_per_contender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(bench.SWEEP, "cpu", SMALL[:1])
    monkeypatch.setattr(bench, "QUERIES", 200)
    monkeypatch.setattr(bench, "LAYERS", 1)
    out = tmp_path / "kernels.csv"
    assert main(["bench", "kernels", "--turns", "1", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2 * 2 * 2 + 3 * 2
    assert all(float(row["milliseconds"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert all(float(row["ratio"]) == 1 for row in rows[::2])
    assert {row["implementation"] for row in rows} == {"grid_sample", "numba", "whole batch", "per image"}


def test_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.csv"
    there.write_text("old")
    assert main(["bench", "kernels", "--out", str(there)]) == 2
    assert there.read_text() == "old" and "give a new file with --out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "kernels", "--device", "cuda", "--out", str(tmp_path / "new.csv")]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the session would take minutes")
def test_gpu_session_refuses_a_machine_without_one(tmp_path: Path) -> None:
    script = Path(bench.__file__).with_name("gpu_session.sh")
    command = ["sh", str(script), str(tmp_path / "results")]
    result = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert result.returncode == 2 and "torch sees no CUDA device" in result.stderr
    assert not (tmp_path / "results").exists()
