"""The windowed value gradient in Triton's interpreter; run by test_triton_interpreted.py, which sets TRITON_INTERPRET=1
before triton is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.deform_attn import tuning
from tests.support.attention_cases import Case, assert_close, gradients, make_case

SHAPES = ((9, 19), (4, 9), (2, 5), (1, 3), (1, 1))


@pytest.fixture(autouse=True)
def few_and_large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by the number of programs."""
    monkeypatch.setattr(tuning, "rule", lambda *_: tuning.LaunchShape(64, 1))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def encoder(
    levels: int = 2, channels: int = 16, points: int = 2, spread: float = 3.0, box: bool = False, batch: int = 1
) -> Case:
    """Every token a query at its own place, or in a box around it; `spread` of the offsets in pixels."""
    draw = torch.Generator().manual_seed(levels * channels + points)
    shapes = SHAPES[:levels]
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack([x, y], -1).view(-1, 2))
    reference = torch.cat(centres)[None, :, None].expand(batch, -1, levels, -1)
    tokens = reference.shape[1]
    offsets = torch.randn(batch, tokens, 1, levels, points, 2, generator=draw) * spread
    if box:
        reference = torch.cat([reference, torch.full_like(reference, 0.2)], -1)
    # At least 0.01 of a cell away from a whole coordinate, where the slope jumps.
    sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float64)[:, None]
    scale = sizes * 0.2 * 0.5 / points if box else torch.ones(())
    pixel = reference[:, :, None, :, None, :2].double() * sizes - 0.5 + offsets.double() * scale
    near = (pixel - pixel.round()).abs() < 0.01
    offsets = offsets + torch.where(near, 0.05 / scale, 0.0).float()
    return Case(
        torch.randn(batch, tokens, 1, channels, generator=draw),
        offsets,
        torch.randn(batch, tokens, 1, levels * points, generator=draw) * 2,
        reference.float().contiguous(),
        shapes,
    )


def check(case: Case, bound: float) -> None:
    grad = torch.randn(*case.value.shape[:2], case.value.shape[3]).to(case.value.dtype).float()
    actual = gradients(case, "triton_windowed", grad)
    for computed, exact in zip(actual, gradients(case.double(), "reference", grad), strict=True):
        assert_close(computed, exact, bound)


@pytest.mark.parametrize(("channels", "box"), [(8, False), (9, True), (32, False)])
def test_equals_float64_for_head_sizes_and_references(channels: int, box: bool) -> None:
    check(encoder(channels=channels, box=box), 1e-5)


@pytest.mark.parametrize(("levels", "points"), [(1, 1), (5, 3)])
def test_equals_float64_for_levels_and_points(levels: int, points: int) -> None:
    check(encoder(levels, points=points), 1e-5)


@pytest.mark.parametrize("spread", [0.0, 15.0])
def test_near_and_far_samples(spread: float) -> None:
    """All in the window, and most outside."""
    check(encoder(spread=spread), 1e-5)


def test_two_images_and_references_elsewhere() -> None:
    """References that have nothing to do with the place of their query: everything is far, and right."""
    case = encoder(batch=2)
    order = torch.randperm(case.value.shape[1])
    check(replace(case, reference_points=case.reference_points[:, order].contiguous()), 1e-3)
    check(case, 1e-5)


def test_narrow_and_wide_values() -> None:
    case = encoder(channels=32)
    check(replace(case, value=case.value.bfloat16()), 5e-3)
    check(case.double(), 1e-13)


def test_value_gradient_is_the_adjoint() -> None:
    case = encoder(levels=1, channels=8)
    grad, direction = torch.randn(*case.value.shape[:2], 8), torch.randn_like(case.value)
    pulled = gradients(case, "triton_windowed", grad)[1]
    pushed = replace(case, value=direction).run("triton")
    assert torch.allclose((grad * pushed).sum(), (pulled * direction).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [float("nan"), -1e30])
def test_broken_coordinates_contribute_nothing(broken: float) -> None:
    case = encoder()
    offsets, outside = case.offsets.clone(), case.offsets.clone()
    offsets[:, ::3, :, 0, 0, 0], outside[:, ::3, :, 0, 0, 0] = broken, 1e4
    grad = torch.randn(*case.value.shape[:2], 16)
    actual = gradients(replace(case, offsets=offsets), "triton_windowed", grad)
    expected = gradients(replace(case, offsets=outside).double(), "reference", grad)
    for computed, exact in zip(actual, expected, strict=True):
        assert_close(computed, exact, 1e-5)


@pytest.mark.usefixtures("deterministic")
def test_fixed_point_gradients_equal_float64_and_repeat() -> None:
    """New memory is NaN in this mode, so every number is written, those of maps that end within a tile too."""
    assert torch.empty(3).isnan().all()
    case = encoder()
    check(case, 1e-5)
    grad = torch.randn(*case.value.shape[:2], 16)
    first = gradients(case, "triton_windowed", grad)
    assert all(torch.equal(a, b) for a, b in zip(gradients(case, "triton_windowed", grad), first, strict=True))


@pytest.mark.parametrize("place", ["gradient", "logit"])
def test_what_is_not_a_number_arrives(place: str) -> None:
    case, grad = encoder(levels=1), torch.ones(1, 171, 16)
    logits = case.logits.clone()
    (grad if place == "gradient" else logits)[0, 100, 0] = float("nan")
    assert not gradients(replace(case, logits=logits), "triton_windowed", grad)[1].isfinite().all()


def test_needs_a_query_per_token() -> None:
    case = make_case(levels=1, heads=1)
    with pytest.raises(ValueError, match="got 13 queries and 35 tokens, but needs one query per token"):
        gradients(case, "triton_windowed", torch.ones(2, 13, 16))


def test_samples_are_counted_once() -> None:
    """The gradient of a sum of ones: every sample inside adds its weight to the cells, exactly once."""
    case = encoder(levels=1, spread=6.0)
    grad = torch.ones(1, 171, 16)
    direct: tuple[Tensor, ...] = gradients(case, "triton", grad)
    windowed = gradients(case, "triton_windowed", grad)
    assert_close(windowed[1].sum(), direct[1].sum().double(), 1e-6)
    assert torch.equal(windowed[2], direct[2]) and torch.equal(windowed[3], direct[3])
