"""What the compiler makes of the Triton kernels for GPUs that need not be here, as rows of a table.

Each kernel is compiled with the launch shape that `tuning.rule` gives it; the arguments are those that the host code
passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.compile_check import WARP, Compiled, compile_kernel
from kernels.deform_attn.triton_backward import ADD_FIXED, ADD_FLOATS, GROUP, deform_attn_backward_kernel
from kernels.deform_attn.triton_forward import deform_attn_forward_kernel
from kernels.deform_attn.triton_sampling import SIZES
from kernels.deform_attn.triton_window import LEAST_CHANNELS, deform_attn_window_kernel, precision
from kernels.deform_attn.tuning import Direction, LaunchShape, rule, window_shape
from kernels.matching.triton_assignment import COLUMNS_PER_WARP, ROWS_AT_ONCE, assignment_kernel
from kernels.matching.triton_cost import matching_cost_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAPABILITIES = (80, 90, 100)
HEADS, MATCHER_BLOCK = 8, 1024
# Of one multiprocessor from compute capability 8.0 on; a warp gets them in steps of 8 per thread.
REGISTERS, REGISTER_STEP, MOST_WARPS = 65_536, 8, 64


@dataclass(frozen=True)
class AttentionShape:
    """What decides what is compiled, beside direction and target. box: 4-d references."""

    dtype: str
    channels: int = 32
    levels: int = 4
    points: int = 4
    box: bool = False

    def __str__(self) -> str:
        kind = "4-d" if self.box else "2-d"
        return f"{HEADS} heads, {self.channels} channels, {self.levels} levels, {self.points} points, {kind}"

    def launch(self, direction: Direction, fixed: bool = False) -> LaunchShape:
        return rule(direction, self.channels, self.levels * self.points, DTYPES[self.dtype], fixed)

    def padded(self) -> int:
        return -(-self.channels // GROUP) * GROUP

    def constants(self, direction: Direction) -> dict[str, Any]:
        return {
            "HEADS": HEADS,
            "CHANNELS": self.channels,
            "LEVELS": self.levels,
            "POINTS": self.points,
            "BOX": self.box,
            "COMPUTE": tl.float32,
            "BLOCK_QUERIES": self.launch(direction).queries,
            "BLOCK_CHANNELS": triton.next_power_of_2(self.padded() if direction == "backward" else self.channels),
        }


@dataclass(frozen=True)
class CompiledRow:
    """triton: its version. spill_bytes: of stack, per thread. warps_per_sm: as many as the registers of one
    multiprocessor allow."""

    triton: str
    kernel: str
    capability: int
    dtype: str
    shape: str
    registers: int
    spill_bytes: int
    barriers: int
    warps_per_sm: int


def measure_compiled() -> Iterator[CompiledRow]:
    """Every kernel at the shape of DINO for every target, dtype and kind of reference; windows only for encoders."""
    for capability, dtype, box in itertools.product(CAPABILITIES, DTYPES, (False, True)):
        shape = AttentionShape(dtype, box=box)
        yield _row("forward", capability, dtype, str(shape), compile_forward(capability, shape))
        yield _row("backward", capability, dtype, str(shape), compile_backward(capability, shape))
        if not box:
            yield _row(
                "backward, deterministic", capability, dtype, str(shape), compile_backward(capability, shape, True)
            )
            yield _row("backward, windows", capability, dtype, str(shape), compile_window(capability, shape))
    for capability in CAPABILITIES:
        cost, assignment = compile_matcher(capability)
        yield _row("matching cost", capability, "fp32", "900 queries", cost)
        yield _row("assignment", capability, "fp32", "900 queries", assignment)


def _row(kernel: str, capability: int, dtype: str, shape: str, found: Compiled) -> CompiledRow:
    allocated = -(-found.registers // REGISTER_STEP) * REGISTER_STEP
    warps = min(MOST_WARPS, REGISTERS // (WARP * allocated))
    version = triton.__version__
    return CompiledRow(
        version, kernel, capability, dtype, shape, found.registers, found.stack_bytes, found.barriers, warps
    )


def compile_forward(capability: int, shape: AttentionShape, launch: LaunchShape | None = None) -> Compiled:
    """launch: another one than the rule's."""
    launch = launch or shape.launch("forward")
    types = dict.fromkeys(("value", "offsets", "logits", "output"), f"*{shape.dtype}")
    types |= {"references": "*fp32", **dict.fromkeys(SIZES, "i32")}
    fixed = shape.constants("forward") | {"BLOCK_QUERIES": launch.queries}
    return compile_kernel(
        deform_attn_forward_kernel,
        types,
        fixed,
        capability=capability,
        warps=launch.warps,
        registers=launch.registers,
    )


def compile_backward(capability: int, shape: AttentionShape, deterministic: bool = False) -> Compiled:
    names = ("grad", "value", "offsets", "logits", "grad_offsets", "grad_logits")
    types = dict.fromkeys(names, f"*{shape.dtype}") | dict.fromkeys(SIZES, "i32")
    types |= {"references": "*fp32", "sums": "*i64" if deterministic else "*fp32", "fixed_point_scale": "*fp32"}
    fixed = shape.constants("backward")
    fixed |= {"PADDED": shape.padded(), "ADDING": (ADD_FIXED if deterministic else ADD_FLOATS).value}
    fixed["BLOCK_SAMPLES"] = triton.next_power_of_2(shape.levels * shape.points)
    launch = shape.launch("backward", deterministic)
    fixed["BLOCK_QUERIES"] = launch.queries
    return compile_kernel(
        deform_attn_backward_kernel,
        types,
        fixed,
        capability=capability,
        warps=launch.warps,
        registers=launch.registers,
    )


def compile_window(capability: int, shape: AttentionShape) -> Compiled:
    types = dict.fromkeys(("grad", "offsets", "logits"), f"*{shape.dtype}") | dict.fromkeys(SIZES, "i32")
    types |= {"references": "*fp32", "sums": "*fp32", "fixed_point_scale": "*fp32"}
    fixed = shape.constants("backward") | {"PADDED": shape.padded(), "ADDING": ADD_FLOATS.value}
    fixed["BLOCK_SAMPLES"] = triton.next_power_of_2(shape.levels * shape.points)
    fixed["PRECISION"] = precision(DTYPES[shape.dtype].itemsize)
    fixed["BLOCK_CHANNELS"] = max(LEAST_CHANNELS, triton.next_power_of_2(shape.padded()))
    launch = window_shape(fixed["BLOCK_CHANNELS"] * DTYPES[shape.dtype].itemsize, shape.levels * shape.points)
    fixed["CELLS"] = launch.cells
    del fixed["BLOCK_QUERIES"], types["queries"]
    return compile_kernel(deform_attn_window_kernel, types, fixed, capability=capability, warps=launch.warps)


def compile_matcher(capability: int) -> tuple[Compiled, Compiled]:
    """Cost and assignment for 900 queries: a vector of 1024 in the registers of 4 and of 8 warps."""
    costs = {"costs": "*fp32", "minimum": "*fp32", "cheapest": "*i32"}
    sizes = dict.fromkeys(("images", "queries", "classes", "targets"), "i32")
    weights = dict.fromkeys(("class_cost", "box_cost", "giou_cost", "alpha", "broken_cost"), "fp32")
    inputs = {"logits": "*fp32", "boxes": "*fp32", "labels": "*i64", "target_boxes": "*fp32", "image": "*i32"}
    fixed = {"LOG_EPSILON": 1e-8, "AREA_EPSILON": 1e-6, "BLOCK": MATCHER_BLOCK}
    types = {**costs, **sizes, **weights, **inputs}
    cost = compile_kernel(matching_cost_kernel, types, fixed, capability=capability, warps=4)
    scratch = {"starts": "*i32", "potential": "*fp64", "column_of_row": "*i64", "row_of_column": "*i32"}
    block = {"BLOCK": MATCHER_BLOCK, "ROWS": ROWS_AT_ONCE}
    warps = MATCHER_BLOCK // COLUMNS_PER_WARP
    types = {**costs, **scratch, **sizes}
    return cost, compile_kernel(assignment_kernel, types, block, capability=capability, warps=warps)
