"""The Triton kernels compiled for GPUs that are not here: nothing spilled, gradients added by wide atomics.

The default suite has every target with every dtype; at the shape of DINO it has the backward kernel for all of these,
and the forward one, whose loops are unrolled and which takes five times as long to compile, once per target, dtype and
kind of reference. The slow tests have the whole product, and other shapes.
"""

from __future__ import annotations

import pytest

from kernels.bench_compiled import (
    AttentionShape,
    compile_backward,
    compile_forward,
    compile_matcher,
    compile_window,
)
from kernels.compile_check import Compiled
from kernels.deform_attn.tuning import LaunchShape

TARGETS = (80, 90, 100)
NAMES = ("bf16", "fp16", "fp32")
# Every target with every dtype, and each of both with both kinds of reference.
COVERING = [
    (capability, dtype, (row + column) % 2 == 1)
    for row, capability in enumerate(TARGETS)
    for column, dtype in enumerate(NAMES)
]
WHOLE_FORWARD = [(80, "fp16", True), (90, "bf16", False), (100, "fp32", True)]
WHOLE_PAIRS = [(capability, dtype) for capability, dtype, _ in WHOLE_FORWARD]


def check_forward(compiled: Compiled) -> None:
    assert compiled.stack_bytes == 0 and compiled.barriers == 0 and not compiled.atomics
    assert 0 < compiled.registers < 128


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


def test_the_covering_set_covers() -> None:
    assert {(capability, dtype) for capability, dtype, _ in COVERING} == {(c, d) for c in TARGETS for d in NAMES}
    assert {(capability, box) for capability, _, box in COVERING} == {(c, b) for c in TARGETS for b in (False, True)}
    assert {(dtype, box) for _, dtype, box in COVERING} == {(d, b) for d in NAMES for b in (False, True)}


@pytest.mark.parametrize(("capability", "dtype", "box"), WHOLE_FORWARD)
def test_forward_spills_nothing_and_needs_no_barrier(capability: int, dtype: str, box: bool) -> None:
    check_forward(compile_forward(capability, AttentionShape(dtype, box=box)))


@pytest.mark.parametrize(("capability", "dtype", "box"), [case for case in COVERING if case[:2] not in WHOLE_PAIRS])
def test_forward_of_one_level_for_every_other_target_and_dtype(capability: int, dtype: str, box: bool) -> None:
    check_forward(compile_forward(capability, AttentionShape(dtype, levels=1, box=not box)))


@pytest.mark.parametrize(("capability", "dtype", "box"), COVERING)
def test_backward_spills_nothing_and_adds_four_channels_at_once(capability: int, dtype: str, box: bool) -> None:
    check_atomics(compile_backward(capability, AttentionShape(dtype, box=box)), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("box", [False, True])
def test_every_target_dtype_and_reference(capability: int, dtype: str, box: bool) -> None:
    shape = AttentionShape(dtype, box=box)
    check_forward(compile_forward(capability, shape))
    check_atomics(compile_backward(capability, shape), capability)
    check_atomics(compile_window(capability, shape), capability)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16"), (100, "fp16")])
def test_windows_spill_nothing_and_add_four_channels_at_once(capability: int, dtype: str) -> None:
    compiled = compile_window(capability, AttentionShape(dtype))
    check_atomics(compiled, capability)
    assert any("MMA" in name for name in compiled.instructions), "the sums are not made by matrix products"


@pytest.mark.parametrize("channels", [9, 12])
def test_odd_head_sizes_add_four_channels_at_once(channels: int) -> None:
    check_atomics(compile_backward(90, AttentionShape("bf16", channels, 1, 1)), 90)


def test_deterministic_backward_adds_integers() -> None:
    check_integers(compile_backward(90, AttentionShape("bf16", levels=2), deterministic=True))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "box"), COVERING)
def test_deterministic_backward_of_every_target_and_dtype(capability: int, dtype: str, box: bool) -> None:
    check_integers(compile_backward(capability, AttentionShape(dtype, box=box), deterministic=True))


def check_integers(compiled: Compiled) -> None:
    assert compiled.stack_bytes == 0
    assert compiled.atomics and all(name.endswith("relaxed.add.u64") for name in compiled.atomics), compiled.atomics
    check_no_result_is_awaited(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_many_samples_of_few_channels_spill_nothing(capability: int) -> None:
    """Left alone, the compiler spills 8 to 16 bytes here."""
    check_atomics(compile_backward(capability, AttentionShape("fp32", 8, 5, 4)), capability)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "box"), [(80, False), (90, True)])
@pytest.mark.parametrize(("channels", "points"), [(8, 4), (9, 4), (16, 4), (30, 4), (32, 4), (64, 4)])
@pytest.mark.parametrize("dtype", NAMES)
def test_every_head_size_dtype_and_reference(
    capability: int, box: bool, channels: int, points: int, dtype: str
) -> None:
    shape = AttentionShape(dtype, channels, 5, points, box)
    assert compile_forward(capability, shape).stack_bytes == 0
    check_atomics(compile_backward(capability, shape), capability)


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
    check_atomics(compile_window(capability, AttentionShape(dtype, channels, levels, points, box)), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", NAMES)
def test_most_samples_of_fewest_channels_spill_nothing(capability: int, dtype: str) -> None:
    """Forty samples of eight channels: half the queries per program, so that two channels are added at once."""
    compiled = compile_backward(capability, AttentionShape(dtype, 8, 5, 8, True))
    assert compiled.stack_bytes == 0
    kind = "relaxed.add.v2.f32" if capability >= 90 else "relaxed.add.f32"
    assert all(name.endswith(kind) for name in compiled.atomics), compiled.atomics


@pytest.mark.parametrize("capability", TARGETS)
def test_matcher_spills_nothing(capability: int) -> None:
    cost, assignment = compile_matcher(capability)
    assert cost.stack_bytes == assignment.stack_bytes == 0
    assert not cost.atomics and list(assignment.atomics) == ["atom.global.gpu.relaxed.min.s32"]


def test_a_spill_would_be_seen() -> None:
    """Eight rows of 64 channels do not fit 24 registers."""
    shape = AttentionShape("fp32", 64, levels=1, points=1)
    assert compile_forward(90, shape, LaunchShape(queries=8, warps=1, registers=24)).stack_bytes > 0
