"""The Triton kernels of deformable attention in Triton's interpreter; run by test_triton_interpreted.py, which sets
TRITON_INTERPRET=1 before triton is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.deform_attn import triton_backward, tuning
from tests.support import attention_properties
from tests.support.attention_cases import Case, assert_close, check_against_double, gradients, make_case


@pytest.fixture(autouse=True)
def few_and_large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by the number of programs."""
    monkeypatch.setattr(tuning, "rule", lambda *_: tuning.LaunchShape(32, 1))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels", [8, 9, 12, 30, 32, 64])
def test_equals_float64_for_every_head_size(channels: int) -> None:
    check_against_double(
        make_case(levels=2, points=2, heads=1, channels=channels, box=channels % 3 == 0), 1e-5, "triton"
    )


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize(("levels", "points"), [(1, 1), (1, 8), (2, 7), (4, 4), (5, 3)])
def test_equals_float64_for_levels_and_points(levels: int, points: int, box: bool) -> None:
    case = make_case(levels=levels, points=points, queries=5, heads=1, channels=8, box=box, seed=points)
    check_against_double(case, 1e-5, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_stay_within_their_rounding(dtype: torch.dtype) -> None:
    case = make_case(levels=2, box=True, channels=32, heads=1)
    check_against_double(replace(case, value=case.value.to(dtype), logits=case.logits.to(dtype)), 5e-3, "triton")
    rounded = replace(case, value=case.value.to(dtype), offsets=case.offsets.to(dtype))
    assert_close(rounded.run("triton"), rounded.double().run("reference"), 5e-3)


def test_float64_is_computed_in_float64() -> None:
    check_against_double(make_case(levels=2, heads=2, channels=12).double(), 1e-13, "triton")


@pytest.mark.parametrize("queries", [0, 1, 17, 33])
def test_any_number_of_queries_in_two_images(queries: int) -> None:
    check_against_double(make_case(levels=2, points=2, heads=1, queries=queries), 1e-5, "triton")


def test_rule_of_launch_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(levels=2, points=1, heads=1, queries=9, channels=20)
    expected = case.run("triton")
    monkeypatch.undo()
    assert_close(case.run("triton"), expected, 1e-6)
    check_against_double(case, 1e-5, "triton")


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1e30, 2.0**31, -(2.0**63)])
def test_broken_coordinates_contribute_nothing(broken: float, box: bool) -> None:
    case = make_case(levels=1, heads=2, box=box)
    offsets, outside = case.offsets.clone(), case.offsets.clone()
    offsets[:, ::3, 1, :, 0, 0] = broken
    outside[:, ::3, 1, :, 0, 0] = 1e4
    grad = torch.randn(2, 13, 32)
    actual = gradients(replace(case, offsets=offsets), "triton", grad)
    expected = gradients(replace(case, offsets=outside).double(), "reference", grad)
    for computed, exact in zip(actual, expected, strict=True):
        assert_close(computed, exact, 1e-5)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_reference_points_contribute_nothing(broken: float, box: bool) -> None:
    case = make_case(levels=2, heads=2, box=box)
    reference_points = case.reference_points.clone()
    reference_points[0, 0] = broken
    output, _, grad_offsets, grad_logits = gradients(
        replace(case, reference_points=reference_points), "triton", torch.ones(2, 13, 32)
    )
    assert all(tensor.isfinite().all() for tensor in (output, grad_offsets, grad_logits))
    assert output[0, 0].eq(0).all() and grad_offsets[0, 0].eq(0).all()


def test_exact_cells_and_borders() -> None:
    """On a cell the sample is the cell and the slope the one to its right; on -1 and on the width it is nothing."""
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)
    pixels = torch.tensor([-1.0, -0.5, 0.0, 1.0, 3.0, 3.5, 4.0])
    offsets = torch.stack([pixels + 0.5, torch.full_like(pixels, 0.5)], -1).view(1, 7, 1, 1, 1, 2)
    case = Case(value, offsets, torch.zeros(1, 7, 1, 1), torch.zeros(1, 7, 1, 2), ((1, 4),))
    output, _, grad_offsets, _ = gradients(case, "triton", torch.ones(1, 7, 1))
    assert output.flatten().tolist() == [0.0, 0.5, 1.0, 10.0, 1000.0, 500.0, 0.0]
    assert grad_offsets[0, 2:5, 0, 0, 0, 0].tolist() == [9.0, 90.0, -1000.0]


def test_is_linear_in_value_with_the_right_adjoint() -> None:
    attention_properties.linear_in_value_with_the_right_adjoint("triton", levels=2, heads=1, points=2, channels=8)


def test_constant_maps_give_the_constant_inside() -> None:
    attention_properties.constant_maps_give_the_constant_inside("triton", levels=2, heads=1, points=2, channels=8)


def test_queries_are_independent() -> None:
    attention_properties.queries_are_independent("triton", levels=2, heads=1, points=2, channels=8)


def test_moving_map_and_samples_together_changes_nothing() -> None:
    attention_properties.moving_map_and_samples_together_changes_nothing("triton", heads=1)


@pytest.mark.parametrize("channels", [8, 9])
def test_every_number_of_every_result_is_written(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head size that fills no whole block, and more queries than a whole number of programs."""
    sizes = {"levels": 2, "heads": 1, "points": 3, "channels": channels, "queries": 33}
    attention_properties.every_number_of_every_result_is_written("triton", monkeypatch, **sizes)


def test_inputs_need_not_be_contiguous() -> None:
    case = make_case(levels=2, heads=2, box=True)
    strided = Case(
        case.value.transpose(1, 3).contiguous().transpose(1, 3),
        case.offsets.transpose(0, 4).contiguous().transpose(0, 4),
        torch.cat([case.logits, case.logits], -1)[..., : case.logits.shape[-1]],
        case.reference_points[:, :, :1].expand(-1, -1, 2, -1),
        case.level_shapes,
    )
    dense = Case(*(t.contiguous() for t in list(vars(strided).values())[:4]), level_shapes=case.level_shapes)
    grad = torch.randn(2, 32, 13).transpose(1, 2)
    for actual, expected in zip(gradients(strided, "triton", grad), gradients(dense, "triton", grad), strict=True):
        assert torch.equal(actual, expected)


def test_more_than_two_to_the_31_cells() -> None:
    """Sparse memory: only the touched pages of these 4.5 GB exist."""
    height, width, heads, channels = 4096, 4352, 8, 8
    assert 2 * height * width * heads * channels > 2**31
    value = torch.from_numpy(np.zeros((2, height * width, heads, channels), np.float16))
    value[1, -1] = 3.0
    corner = torch.tensor([[[[(width - 0.5) / width, (height - 0.5) / height]]]]).expand(2, 1, 1, 2)
    offsets, logits = torch.zeros(2, 1, heads, 1, 1, 2), torch.zeros(2, 1, heads, 1)
    output = Case(value, offsets, logits, corner, ((height, width),)).run("triton")
    assert output[0].eq(0).all() and (output[1] - 3).abs().max() < 0.01


def test_gradients_of_more_than_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_properties.gradients_of_more_than_two_to_the_31_numbers(triton_backward.backward, monkeypatch)


def test_levels_it_cannot_take_are_named() -> None:
    zeros = torch.zeros(1, 1, 1, 6, 1, 2)
    case = Case(torch.zeros(1, 6, 1, 8), zeros, torch.zeros(1, 1, 1, 6), torch.zeros(1, 1, 6, 2), ((1, 1),) * 6)
    with pytest.raises(ValueError, match="impl='triton' takes at most 5 levels, got 6"):
        case.run("triton")
    one = make_case(levels=1, batch=1, queries=1, heads=1)
    with pytest.raises(ValueError, match="at most 32767 rows and columns, got 40000"):
        replace(one, value=torch.zeros(1, 40_000, 1, 16), level_shapes=((1, 40_000),)).run("triton")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("channels", [8, 9])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_fixed_point_gradients_equal_float64(size: float, channels: int) -> None:
    case = make_case(levels=2, points=2, heads=1, channels=channels)
    grad = torch.randn(2, 13, channels) * size
    actual, expected = gradients(case, "triton", grad), gradients(case.double(), "reference", grad)
    for computed, exact in zip(actual[1:], expected[1:], strict=True):
        assert_close(computed / size, exact / size, 1e-5)


@pytest.mark.usefixtures("deterministic")
def test_fixed_point_sums_do_not_depend_on_the_order() -> None:
    """Queries in another order mean another order of additions; float32 sums differ then, these may not."""
    case, order = make_case(levels=1, heads=1, queries=48), torch.randperm(48)
    grad = torch.randn(2, 48, 16)
    shuffled = replace(
        case,
        offsets=case.offsets[:, order],
        logits=case.logits[:, order],
        reference_points=case.reference_points[:, order],
    )

    def value_gradients() -> tuple[Tensor, Tensor]:
        return gradients(case, "triton", grad)[1], gradients(shuffled, "triton", grad[:, order])[1]

    first, second = value_gradients()
    assert torch.equal(first, second)
    torch.use_deterministic_algorithms(False)
    first, second = value_gradients()
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_fixed_point_does_not_hide_a_broken_gradient(broken: float) -> None:
    case = make_case(levels=1, heads=1, queries=3)
    grad = torch.ones(2, 3, 16)
    grad[0, 0, 0] = broken
    assert not gradients(case, "triton", grad)[1].isfinite().all()
    assert gradients(case, "triton", torch.zeros(2, 3, 16))[1].eq(0).all()


def test_not_deterministic_on_cpu_means_float_sums() -> None:
    """The same numbers either way, so that switching the mode on does not change a trajectory visibly."""
    case, grad = make_case(levels=2, heads=2), torch.randn(2, 13, 32)
    floating = gradients(case, "triton", grad)
    torch.use_deterministic_algorithms(True)
    try:
        fixed = gradients(case, "triton", grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(floating, fixed, strict=True):
        assert_close(first, second.double(), 1e-6)
