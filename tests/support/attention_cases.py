"""Inputs of deformable attention, and their comparison with the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.deform_attn import deform_attn


@dataclass(frozen=True)
class Case:
    value: Tensor
    offsets: Tensor
    logits: Tensor
    reference_points: Tensor
    level_shapes: tuple[tuple[int, int], ...]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.value, self.offsets, self.logits, self.reference_points

    def double(self) -> Case:
        return Case(*(tensor.double() for tensor in self.tensors()), level_shapes=self.level_shapes)

    def to(self, device: str) -> Case:
        return Case(*(tensor.to(device) for tensor in self.tensors()), level_shapes=self.level_shapes)

    def run(self, impl: str = "cpu") -> Tensor:
        return deform_attn(self.value, self.offsets, self.logits, self.reference_points, self.level_shapes, impl)


SHAPES = ((5, 7), (1, 1), (3, 2), (9, 1), (4, 4))


def make_case(
    levels: int = 3,
    batch: int = 2,
    queries: int = 13,
    heads: int = 3,
    channels: int = 16,
    points: int = 4,
    box: bool = False,
    seed: int = 0,
) -> Case:
    """Samples up to two cells outside the map, and at least 0.01 of a cell from a whole coordinate, where the slope
    jumps and rounding would decide the gradient."""
    draw = torch.Generator().manual_seed(seed)
    shapes = SHAPES[:levels]
    tokens = sum(height * width for height, width in shapes)
    sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float64)
    reference = torch.rand(batch, queries, levels, 4 if box else 2, generator=draw)
    if box:
        reference[..., 2:] = reference[..., 2:] * 0.5 + 0.1
    layout = (batch, queries, heads, levels, points, 2)
    span = sizes[:, None, :] + 4
    cell = (torch.rand(layout, generator=draw, dtype=torch.float64) * span).floor() - 2
    pixel = cell + 0.01 + 0.98 * torch.rand(layout, generator=draw, dtype=torch.float64)
    offsets = pixel + 0.5 - (reference[..., :2].double() * sizes)[:, :, None, :, None]
    if box:
        offsets /= (sizes * reference[..., 2:].double())[:, :, None, :, None] * 0.5 / points
    return Case(
        torch.randn(batch, tokens, heads, channels, generator=draw),
        offsets.float(),
        torch.randn(batch, queries, heads, levels * points, generator=draw) * 2,
        reference,
        shapes,
    )


def gradients(case: Case, impl: str, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (case.value, case.offsets, case.logits)]
    output = replace(case, value=leaves[0], offsets=leaves[1], logits=leaves[2]).run(impl)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))


def assert_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    difference = (actual.double() - expected.double()).norm()
    assert difference <= bound * expected.double().norm() + 1e-12, f"{difference / expected.double().norm():.2e}"


def check_against_double(case: Case, bound: float, impl: str = "cpu", device: str = "cpu") -> None:
    """Computed on `device`, compared on the CPU."""
    grad = torch.randn(case.offsets.shape[0], case.offsets.shape[1], case.value.shape[2] * case.value.shape[3])
    # The gradient arrives rounded to the dtype of the output.
    grad = grad.to(case.value.dtype).float()
    actual = gradients(case.to(device), impl, grad.to(device))
    expected = gradients(case.double(), "reference", grad)
    for computed, exact, source in zip(
        actual, expected, (case.value, case.value, case.offsets, case.logits), strict=True
    ):
        assert computed.dtype == source.dtype
        assert_close(computed.cpu(), exact, bound)
