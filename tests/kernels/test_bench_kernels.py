"""The comparison of kernels: that the contenders compute the same, and what the command writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.bench_official import attention_by_grid_sample, match_whole_batch
from kernels.deform_attn import deform_attn
from kernels.matching import match
from launch.cli import main

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
