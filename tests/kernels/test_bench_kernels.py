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

from kernels import bench, bench_atomics, bench_cases, bench_compiled, bench_peers, compile_check
from kernels.bench_conclusions import conclusions
from kernels.bench_official import attention_by_grid_sample, match_whole_batch
from kernels.bench_timing import Row, Times, failure, least_times, rows
from kernels.compile_check import compile_kernel
from kernels.deform_attn import deform_attn
from kernels.matching import match
from launch.cli import main
from launch.commands import bench_kernels
from launch.provenance import commit, machine

SMALL = (
    bench_cases.Layer("encoder", ((6, 5), (3, 3)), 2, 0),
    bench_cases.Layer("decoder", ((6, 5), (3, 3)), 2, 11),
)


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_attention_contenders_compute_the_same(layer: bench_cases.Layer) -> None:
    case = bench_cases.attention_case(layer, torch.float32, torch.device("cpu"))
    usual, ours = attention_by_grid_sample(*case, layer.level_shapes), deform_attn(*case, layer.level_shapes)
    assert torch.allclose(usual, ours, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(usual)
    expected = torch.autograd.grad(usual, case[:3], grad)
    for usual_gradient, our_gradient in zip(expected, torch.autograd.grad(ours, case[:3], grad), strict=True):
        assert (usual_gradient - our_gradient).norm() < 1e-3 * usual_gradient.norm()


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_arguments_of_msda_triton(layer: bench_cases.Layer) -> None:
    """Evaluated by the definition in its documentation: the sum of weighted bilinear samples, zeros outside."""
    case = bench_cases.attention_case(layer, torch.float32, torch.device("cpu"))
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
    case = bench_cases.attention_case(layer, torch.float32, torch.device("cpu"))
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
    case = bench_cases.attention_case(layer, torch.float32, torch.device("cpu"))
    assert set(bench_peers.peers()) == {"official op", "DCNv4 FlashDeformAttn", "msda-triton"}
    failing = functools.partial(bench_peers.attention_by_dcnv4, *case, layer.level_shapes)
    assert failure(failing).startswith("failed: ModuleNotFoundError: No module named 'DCNv4")
    row = Row("encoder", "bf16", "forward", "msda-triton (not installed)")
    assert bench_kernels._figures(row) == "msda-triton (not installed)" and bench_kernels._numbers(row) == ("", "", "")


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_cases.SWEEP, "cpu", SMALL[:1])
    monkeypatch.setattr(bench_cases, "QUERIES", 200)
    monkeypatch.setattr(bench_cases, "LAYERS", 1)


@pytest.mark.usefixtures("small")
def test_command_writes_a_row_per_contender(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    assert main(["bench", "kernels", "--turns", "1", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2 * 2 * 2 + 4 * 2
    assert all(float(row["milliseconds"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert all(float(row["ratio"]) == 1 for row in rows[::2])
    assert all(row["device_milliseconds"] == "" for row in rows)
    assert {row["implementation"] for row in rows} == {"grid_sample", "numba", "whole batch", "per image"}
    assert all(row["commit"] == commit() and row["machine"] == machine("cpu") for row in rows)
    assert all(row["threads"] == str(torch.get_num_threads()) for row in rows)


@pytest.mark.usefixtures("small")
def test_command_measures_only_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.csv"
    assert main(["bench", "kernels", "--turns", "1", "--only", "encoder, bf16, forward +", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(row["dtype"], row["passes"]) for row in rows] == [("bf16", "forward + backward")] * 2
    assert main(["bench", "kernels", "--only", "swin", "--out", str(tmp_path / "other.csv")]) == 2
    assert "--only 'swin' is in none of the comparisons: encoder, fp32, forward;" in capsys.readouterr().err


def test_command_writes_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_compiled, "CAPABILITIES", (90,))
    monkeypatch.setattr(bench_compiled, "DTYPES", {})
    out = tmp_path / "compiled.csv"
    assert main(["bench", "kernels", "--compiled", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["kernel"] for row in rows] == ["matching cost", "assignment"]
    assert all(row["capability"] == "90" and row["spill_bytes"] == "0" and int(row["registers"]) > 0 for row in rows)


def test_warps_that_registers_allow() -> None:
    """A multiprocessor has 65,536 of them, 64 warps at most, and gives them to a warp in steps of 8 per thread."""
    warps = {}
    for registers in (24, 64, 72, 78, 163, 255):
        found = compile_check.Compiled(registers, 0, 0, {}, {})
        warps[registers] = bench_compiled._row("forward", 90, "bf16", "", found).warps_per_sm
    assert warps == {24: 64, 64: 32, 72: 28, 78: 25, 163: 12, 255: 8}


def test_least_of_the_turns_counts_and_the_first_turn_does_not() -> None:
    calls: list[str] = []
    runs = {name: functools.partial(calls.append, name) for name in ("usual", "ours")}
    found = least_times(runs, torch.device("cpu"), 2)
    assert calls == ["usual", "ours"] * 3
    assert all(0 < times.wall < math.inf and math.isnan(times.queued) for times in found.values())


def test_ratio_is_by_the_clock_of_the_device_where_there_is_one() -> None:
    usual, ours = rows("encoder", "bf16", "forward", {"usual": Times(6.0, 4.0), "ours": Times(3.0, 1.0)})
    assert (usual.ratio(), ours.ratio()) == (1.0, 4.0)
    _, ours = rows("encoder", "bf16", "forward", {"usual": Times(6.0), "ours": Times(3.0)})
    assert ours.ratio() == 2.0
    assert bench_kernels._numbers(ours) == ("3000.0000", "", "2.000")


def on_a_card(what: str, dtype: str, passes: str, **milliseconds: float) -> list[Row]:
    named = {name.replace("_", " "): Times(1.0, number / 1e3) for name, number in milliseconds.items()}
    return list(rows(what, dtype, passes, named))


def test_conclusions_name_goals_windows_and_entries() -> None:
    layer, both = "encoder 800x1333", "forward + backward"
    measured = [
        *on_a_card(layer, "bf16", "forward", official_op=0.7, triton=0.2),
        *on_a_card(layer, "bf16", both, official_op=3.0, triton=2.0, triton_windowed=1.0),
        *on_a_card("matching 7 x 8 problems, 50 boxes", "fp32", "forward", whole_batch=20.0, triton=0.25),
        *on_a_card("launch shapes of the encoder, bf16", "bf16", "forward", first=0.2, second=0.1, third=0.15),
        *on_a_card("launch shapes of the encoder, bf16", "bf16", "backward", first=0.2, second=0.199),
    ]
    assert conclusions(measured) == [
        "goal met: encoder 800x1333, bf16, forward: 3.50 times, goal 3",
        "goal missed: encoder 800x1333, bf16, forward + backward: 1.50 times, goal 2",
        "goal missed: matching 7 x 8 problems, 50 boxes: 0.250 ms on the device, goal 0.2 ms",
        "triton_windowed stays (encoder 800x1333, bf16: 2.00 times the direct one)",
        "enter in TIMED of kernels/deform_attn/tuning.py: second,  # 2.00 times the rule's shape",
        "enter nothing in TIMED: launch shapes of the encoder, bf16, backward: no shape beats the rule's by 3%",
    ]
    slower = on_a_card(layer, "bf16", both, grid_sample=9.0, triton=2.0, triton_windowed=2.5)
    assert conclusions(slower)[0].startswith("triton_windowed goes: delete kernels/deform_attn/triton_window.py")
    assert conclusions([Row(layer, "bf16", both, "official op (not installed)")]) == []


def test_atomics_that_are_timed_are_those_of_the_backward_kernel() -> None:
    fixed = {"ROUNDS": bench_atomics.ROUNDS, "BLOCK": bench_atomics.BLOCK, "CHANNELS": bench_atomics.CHANNELS}
    types = {"sums": "*fp32", "rows": "i32"}
    found = compile_kernel(bench_atomics.atomic_rows_kernel, types, fixed, capability=90, warps=1)
    assert list(found.atomics) == ["atom.global.gpu.relaxed.add.v4.f32"] and found.stack_bytes == 0
    assert any(name.startswith("REDG.") for name in found.instructions)


def test_commit_says_where_the_tree_differs_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) == "not a checkout"
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    assert commit(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == git("rev-parse", "--short=12", "HEAD") + "-dirty"


def test_make_bench_runs_every_measurement_into_one_dated_folder() -> None:
    root = Path(bench.__file__).parents[1]
    result = subprocess.run(["make", "-n", "bench"], cwd=root, capture_output=True, text=True, check=True)
    for part in ("bench kernels --device cpu --turns 7", "--compiled", "bench step", "bench loader"):
        assert part in result.stdout
    assert "OMP_NUM_THREADS=1" in result.stdout


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


# Answers as an interpreter would: a card is there, the tests end as they are told to, and what is launched is noted.
_INTERPRETER = """#!/bin/sh
case "$*" in
    *get_device_name*) echo A-card ;;
    "-m pytest "*) echo "1 failed, 99 passed"; exit {status} ;;
    "-m launch "*) echo "$*" >> {noted} ;;
    *timm*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(("status", "ending", "launched"), [(0, 0, True), (1, 1, False)])
def test_gpu_session_times_nothing_after_a_failed_test(
    status: int, ending: int, launched: bool, tmp_path: Path
) -> None:
    interpreter, noted = tmp_path / "python", tmp_path / "noted.txt"
    interpreter.write_text(_INTERPRETER.format(status=status, noted=noted))
    interpreter.chmod(0o755)
    script = Path(bench.__file__).with_name("gpu_session.sh")
    environment = {**os.environ, "PYTHON": str(interpreter)}
    result = subprocess.run(
        ["sh", str(script), "results"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == ending, result.stderr
    assert noted.exists() == launched and "99 passed" in result.stdout
    assert ("the tests above failed; nothing was timed" in result.stderr) != launched
    assert len(list((tmp_path / "results").glob("A-card-*-tests.txt"))) == 1
