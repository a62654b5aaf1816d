"""The Triton kernels compiled for GPUs that are not here: nothing spilled, gradients added by wide atomics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kernels.compile_check import Compiled, compile_kernel
from kernels.deform_attn.triton_backward import ADD_FIXED, ADD_FLOATS, GROUP, deform_attn_backward_kernel
from kernels.deform_attn.triton_forward import deform_attn_forward_kernel
from kernels.deform_attn.triton_sampling import SIZES
from kernels.deform_attn.triton_window import LEAST_CHANNELS, deform_attn_window_kernel, precision
from kernels.deform_attn.tuning import rule, window_shape
from kernels.matching.triton_assignment import COLUMNS_PER_WARP, ROWS_AT_ONCE, assignment_kernel
from kernels.matching.triton_cost import matching_cost_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def constants(direction: Any, dtype: str, channels: int, levels: int, points: int, box: bool) -> dict[str, Any]:
    padded = -(-channels // GROUP) * GROUP if direction == "backward" else channels
    return {
        "HEADS": 8,
        "CHANNELS": channels,
        "LEVELS": levels,
        "POINTS": points,
        "BOX": box,
        "COMPUTE": tl.float32,
        "BLOCK_QUERIES": rule(direction, channels, levels * points, DTYPES[dtype]).queries,
        "BLOCK_CHANNELS": triton.next_power_of_2(padded),
    }


def compile_forward(
    capability: int, dtype: str, channels: int = 32, levels: int = 4, points: int = 4, box: bool = False
) -> Compiled:
    types = dict.fromkeys(("value", "offsets", "logits", "output"), f"*{dtype}")
    types |= {"references": "*fp32", **dict.fromkeys(SIZES, "i32")}
    fixed = constants("forward", dtype, channels, levels, points, box)
    return compile_kernel(deform_attn_forward_kernel, types, fixed, capability=capability, warps=1)


def compile_backward(
    capability: int,
    dtype: str,
    channels: int = 32,
    levels: int = 4,
    points: int = 4,
    box: bool = False,
    deterministic: bool = False,
) -> Compiled:
    names = ("grad", "value", "offsets", "logits", "grad_offsets", "grad_logits")
    types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(SIZES, "i32")
    types |= {"references": "*fp32", "sums": "*i64" if deterministic else "*fp32", "fixed_point_scale": "*fp32"}
    fixed = constants("backward", dtype, channels, levels, points, box)
    fixed |= {"PADDED": -(-channels // GROUP) * GROUP, "ADDING": (ADD_FIXED if deterministic else ADD_FLOATS).value}
    fixed["BLOCK_SAMPLES"] = triton.next_power_of_2(levels * points)
    shape = rule("backward", channels, levels * points, DTYPES[dtype])
    return compile_kernel(
        deform_attn_backward_kernel, types, fixed, capability=capability, warps=shape.warps, registers=shape.registers
    )


def compile_window(
    capability: int, dtype: str, channels: int = 32, levels: int = 4, points: int = 4, box: bool = False
) -> Compiled:
    types = dict.fromkeys(("grad", "offsets", "logits"), f"*{dtype}") | dict.fromkeys(SIZES, "i32")
    types |= {"references": "*fp32", "sums": "*fp32", "fixed_point_scale": "*fp32"}
    padded = -(-channels // GROUP) * GROUP
    fixed = constants("backward", dtype, channels, levels, points, box) | {"PADDED": padded, "ADDING": ADD_FLOATS.value}
    fixed |= {"BLOCK_SAMPLES": triton.next_power_of_2(levels * points), "PRECISION": precision(DTYPES[dtype].itemsize)}
    fixed["BLOCK_CHANNELS"] = max(LEAST_CHANNELS, triton.next_power_of_2(padded))
    shape = window_shape(fixed["BLOCK_CHANNELS"] * DTYPES[dtype].itemsize, levels * points)
    fixed["CELLS"] = shape.cells
    del fixed["BLOCK_QUERIES"], types["queries"]
    return compile_kernel(deform_attn_window_kernel, types, fixed, capability=capability, warps=shape.warps)


def check_atomics(compiled: Compiled, capability: int) -> None:
    """Four floats in one instruction from Hopper on. Ampere has no such instruction: one float each."""
    assert compiled.stack_bytes == 0
    kind = "relaxed.add.v4.f32" if capability >= 90 else "relaxed.add.f32"
    assert compiled.atomics and all(name.endswith(kind) for name in compiled.atomics), compiled.atomics
    check_no_result_is_awaited(compiled)


def check_no_result_is_awaited(compiled: Compiled) -> None:
    """Atomics on shared memory (ATOMS) are the compiler's, which keeps the books of Blackwell's tensor memory so."""
    assert any(name.startswith(("RED.", "REDG.")) for name in compiled.instructions)
    assert not any(name.startswith(("ATOM.", "ATOMG.")) for name in compiled.instructions)


@pytest.mark.parametrize(
    ("capability", "dtype", "levels"), [(80, "bf16", 1), (90, "bf16", 4), (90, "fp32", 1), (100, "bf16", 1)]
)
def test_forward_spills_nothing_and_needs_no_barrier(capability: int, dtype: str, levels: int) -> None:
    compiled = compile_forward(capability, dtype, levels=levels)
    assert compiled.stack_bytes == 0 and compiled.barriers == 0 and not compiled.atomics
    assert 0 < compiled.registers < 128


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "bf16")])
def test_backward_spills_nothing_and_adds_four_channels_at_once(capability: int, dtype: str) -> None:
    check_atomics(compile_backward(capability, dtype), capability)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16"), (90, "fp32"), (100, "bf16")])
def test_windows_spill_nothing_and_add_four_channels_at_once(capability: int, dtype: str) -> None:
    compiled = compile_window(capability, dtype)
    check_atomics(compiled, capability)
    assert any("MMA" in name for name in compiled.instructions), "the sums are not made by matrix products"


@pytest.mark.parametrize("channels", [9, 12, 24])
def test_odd_head_sizes_add_four_channels_at_once(channels: int) -> None:
    check_atomics(compile_backward(90, "bf16", channels, levels=1, points=1), 90)


def test_deterministic_backward_adds_integers() -> None:
    compiled = compile_backward(90, "bf16", deterministic=True, levels=2)
    assert compiled.stack_bytes == 0
    assert compiled.atomics and all(name.endswith("relaxed.add.u64") for name in compiled.atomics), compiled.atomics
    check_no_result_is_awaited(compiled)


@pytest.mark.parametrize("capability", [80, 90])
def test_many_samples_of_few_channels_spill_nothing(capability: int) -> None:
    """Left alone, the compiler spills 8 to 16 bytes here."""
    check_atomics(compile_backward(capability, "fp32", 8, 5, 4), capability)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "box"), [(80, False), (90, True)])
@pytest.mark.parametrize(("channels", "points"), [(8, 4), (9, 4), (16, 4), (32, 4), (64, 4)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_head_size_dtype_and_reference(
    capability: int, box: bool, channels: int, points: int, dtype: str
) -> None:
    assert compile_forward(capability, dtype, channels, 5, points, box).stack_bytes == 0
    check_atomics(compile_backward(capability, dtype, channels, 5, points, box), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("channels", "levels", "points", "box"),
    [(9, 4, 4, False), (64, 5, 4, False), (64, 5, 8, True), (32, 5, 8, True), (16, 5, 8, True)],
)
def test_windows_of_other_shapes(
    capability: int, dtype: str, channels: int, levels: int, points: int, box: bool
) -> None:
    check_atomics(compile_window(capability, dtype, channels, levels, points, box), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_most_samples_of_fewest_channels_spill_nothing(capability: int, dtype: str) -> None:
    """Forty samples of eight channels: half the queries per program, so that two channels are added at once."""
    compiled = compile_backward(capability, dtype, 8, 5, 8, True)
    assert compiled.stack_bytes == 0
    kind = "relaxed.add.v2.f32" if capability >= 90 else "relaxed.add.f32"
    assert all(name.endswith(kind) for name in compiled.atomics), compiled.atomics


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_matcher_spills_nothing(capability: int) -> None:
    """For 900 queries: a vector of 1024 in the registers of 4 and of 8 warps."""
    costs = {"costs": "*fp32", "minimum": "*fp32", "cheapest": "*i32"}
    sizes = dict.fromkeys(("images", "queries", "classes", "targets"), "i32")
    weights = dict.fromkeys(("class_cost", "box_cost", "giou_cost", "alpha", "broken_cost"), "fp32")
    inputs = {"logits": "*fp32", "boxes": "*fp32", "labels": "*i64", "target_boxes": "*fp32", "image": "*i32"}
    constants = {"LOG_EPSILON": 1e-8, "AREA_EPSILON": 1e-6, "BLOCK": 1024}
    types = {**costs, **sizes, **weights, **inputs}
    cost = compile_kernel(matching_cost_kernel, types, constants, capability=capability, warps=4)
    scratch = {"starts": "*i32", "potential": "*fp64", "column_of_row": "*i64", "row_of_column": "*i32"}
    block = {"BLOCK": 1024, "ROWS": ROWS_AT_ONCE}
    types = {**costs, **scratch, **sizes}
    assignment = compile_kernel(assignment_kernel, types, block, capability=capability, warps=1024 // COLUMNS_PER_WARP)
    assert cost.stack_bytes == assignment.stack_bytes == 0
    assert not cost.atomics and list(assignment.atomics) == ["atom.global.gpu.relaxed.min.s32"]


def test_a_spill_would_be_seen() -> None:
    """A whole tile of 128 x 64 in one warp does not fit the registers."""
    types = dict.fromkeys(("value", "offsets", "logits", "output", "references"), "*fp32")
    fixed = {**constants("forward", "fp32", 64, 1, 1, False), "BLOCK_QUERIES": 128}
    types |= dict.fromkeys(SIZES, "i32")
    assert compile_kernel(deform_attn_forward_kernel, types, fixed, capability=90, warps=1).stack_bytes > 0
