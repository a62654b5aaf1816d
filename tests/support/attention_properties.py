"""What must hold for every implementation of deformable attention, on every device: each raises where it does not.

sizes: of `make_case`, for an implementation that is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.attention_cases import Case, assert_close, check_against_double, gradients, make_case


def linear_in_value_with_the_right_adjoint(impl: str, device: str = "cpu", **sizes: int) -> None:
    case = make_case(box=True, **sizes).to(device)
    width = case.value.shape[2] * case.value.shape[3]
    direction, grad = torch.randn_like(case.value), torch.randn(*case.offsets.shape[:2], width, device=device)
    pushed = replace(case, value=direction).run(impl)
    assert_close(replace(case, value=2 * case.value + direction).run(impl), 2 * case.run(impl) + pushed, 1e-6)
    pulled = gradients(case, impl, grad)[1]
    assert torch.allclose((grad * pushed).sum(), (pulled * direction).sum(), rtol=1e-4, atol=1e-4)


def constant_maps_give_the_constant_inside(impl: str, device: str = "cpu", **sizes: int) -> None:
    case = make_case(**sizes).to(device)
    inside = replace(case, value=torch.full_like(case.value, 3.0), offsets=torch.zeros_like(case.offsets))
    middle = torch.full_like(case.reference_points, 0.5)
    output = replace(inside, reference_points=middle).run(impl)
    assert torch.allclose(output, torch.full_like(output, 3.0))


def queries_are_independent(impl: str, device: str = "cpu", **sizes: int) -> None:
    """In another order they give the same rows, and so do their gradients; the sums of the value may differ in bits."""
    case = make_case(queries=17, **sizes).to(device)
    order = torch.randperm(17, device=device)
    shuffled = replace(
        case,
        offsets=case.offsets[:, order],
        logits=case.logits[:, order],
        reference_points=case.reference_points[:, order],
    )
    grad = torch.randn(*case.offsets.shape[:2], case.value.shape[2] * case.value.shape[3], device=device)
    output, grad_value, *rest = gradients(shuffled, impl, grad[:, order])
    expected, expected_value, *expected_rest = gradients(case, impl, grad)
    assert torch.equal(output, expected[:, order])
    assert_close(grad_value, expected_value, 1e-6)
    for computed, first in zip(rest, expected_rest, strict=True):
        assert torch.equal(computed, first[:, order])


def moving_map_and_samples_together_changes_nothing(impl: str, device: str = "cpu", heads: int = 2) -> None:
    """A map moved by two rows and three columns inside zeros, sampled three to the right and two below."""
    draw = torch.Generator().manual_seed(0)
    inner = torch.randn(2, 5, 6, heads, 8, generator=draw)
    value, moved = torch.zeros(2, 12, 14, heads, 8), torch.zeros(2, 12, 14, heads, 8)
    value[:, 3:8, 3:9], moved[:, 5:10, 6:12] = inner, inner
    offsets = torch.randn(2, 9, heads, 1, 4, 2, generator=draw) * 2
    logits, middle = torch.randn(2, 9, heads, 4, generator=draw), torch.full((2, 9, 1, 2), 0.45)
    still = Case(value.flatten(1, 2), offsets, logits, middle, ((12, 14),)).to(device)
    shift = torch.tensor([3.0, 2.0], device=device)
    together = replace(still, value=moved.flatten(1, 2).to(device), offsets=still.offsets + shift)
    assert still.run(impl).abs().sum() > 1
    assert_close(together.run(impl), still.run(impl), 1e-5)


def every_number_of_every_result_is_written(
    impl: str, monkeypatch: pytest.MonkeyPatch, device: str = "cpu", **sizes: Any
) -> None:
    """New memory is NaN: in deterministic mode torch sees to that, otherwise this does."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        check_against_double(make_case(**sizes), 1e-5, impl, device)
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", _poisoned(torch.empty))
        assert torch.empty(3, device=device).isnan().all()
        check_against_double(make_case(**sizes), 1e-5, impl, device)


def _poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fill(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return fill


def gradients_of_more_than_two_to_the_31_numbers(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses that are read and added to need more than 31 bits. Of these 9.1 GB of values, and as many of
    gradients, only the touched pages exist."""
    height, width, heads, channels = 4096, 4352, 4, 16  # whole lines of memory, so that nothing is copied

    def untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        assert dtype == torch.float32
        return torch.from_numpy(np.zeros(shape, np.float32))

    value = untouched((2, height * width, heads, channels), torch.float32)
    assert value.numel() > 2**31
    value[1, -1] = 3.0
    # A quarter of a cell to the right of the last one: three quarters of it are read, and to the right is nothing.
    place = torch.tensor([[[[(width - 0.25) / width, (height - 0.5) / height]]]]).expand(2, 1, 1, 2)
    offsets, logits, grad = torch.zeros(2, 1, heads, 1, 1, 2), torch.zeros(2, 1, heads, 1), torch.ones(2, 1, 64)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", untouched)
        patched.setattr(torch, "zeros_like", lambda like: untouched(like.shape, like.dtype))
        grad_value, grad_offsets, _ = backward(grad, value, offsets, logits, place, [height, width])
    assert (grad_value[:, -1] - 0.75).abs().max() < 0.01
    # Where an address of 31 bits would have gone from the last cell of the second image.
    assert grad_value.view(-1)[(value.numel() - channels) % 2**31 :][:channels].eq(0).all()
    assert grad_offsets[0].eq(0).all() and (grad_offsets[1, ..., 0] + 3 * channels).abs().max() < 0.1
