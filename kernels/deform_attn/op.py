"""The public operator: argument checks, choice of implementation, registration with torch.

Autograd sees two custom operators, forward and backward, that save only their raw inputs: softmax and sampling
locations are recomputed in the backward pass, so nothing of size (queries x samples) is kept between the two.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.deform_attn.reference import deform_attn_reference

IMPLEMENTATIONS = ("auto", "triton", "triton_windowed", "cpu", "reference")
_log = logging.getLogger(__name__)


def deform_attn(
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    impl: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, section 4.1) on raw projections.

    Softmax over the L * P samples, location arithmetic, bilinear sampling (pixel centres at half integers, zeros
    outside) and weighting happen inside, in float32 (float64 for a float64 `value`).

    value: (B, S, M, D) projected tokens of all levels, S = sum of height * width; padding already zeroed.
    offsets: (B, Q, M, L, P, 2) sampling offsets as x, y; pixels for 2-d references, see below for 4-d ones.
    logits: (B, Q, M, L * P) attention weights before the softmax.
    reference_points: (B, Q, L, 2 | 4), float32, as fractions of each map. 2-d: location = reference + offset /
        (width, height). 4-d, a box: location = centre + offset / P * size / 2. No gradient flows into them.
    level_shapes: (height, width) of each level, plain integers.
    impl: "triton" (CUDA), "triton_windowed" (the same with another value gradient, for encoders: one query per token,
        in their order; never chosen by "auto"), "cpu" (numba), "reference" (plain torch), or "auto" by device, said
        once in the log.
        The value gradient of "triton" varies in its last bits from run to run, except under
        `torch.use_deterministic_algorithms(True)`, where it is bit-identical at a higher cost.

    Locations that are NaN, infinite or far outside contribute nothing. Returns (B, Q, M * D) in the dtype of `value`.
    Raises ValueError for arguments that do not fit together, RuntimeError for an implementation that cannot run here.
    """
    chosen = choose_implementation(impl, value.device)
    if not torch.compiler.is_compiling():
        _announce(impl, chosen, value.device.type)
    if reference_points.requires_grad:
        raise ValueError("deform_attn: reference_points require grad, but get no gradient; pass them detached")
    sizes = [int(size) for shape in level_shapes for size in shape]
    if chosen == "reference":
        _check(value, offsets, logits, reference_points, sizes)
        return deform_attn_reference(value, offsets, logits, reference_points, level_shapes)
    return _forward(value, offsets, logits, reference_points, sizes, chosen)


def choose_implementation(impl: str, device: torch.device) -> str:
    """The implementation that runs for `impl` on `device`; raises where the asked one cannot."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"deform_attn: impl={impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        return {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if impl.startswith("triton") and device.type != "cuda" and not _interpreted():
        raise RuntimeError(
            f"deform_attn: impl='{impl}' got tensors on {device}, but runs on CUDA devices only (elsewhere just in "
            "Triton's interpreter, TRITON_INTERPRET=1); use impl='auto' or impl='reference'"
        )
    if impl == "cpu" and device.type != "cpu":
        raise RuntimeError(f"deform_attn: impl='cpu' got tensors on {device}; use impl='auto' or move them to the CPU")
    return impl


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _announce(impl: str, chosen: str, device: str) -> None:
    if impl == "auto":
        _log.info("deformable attention on %s runs the %s implementation", device, chosen)


def _check(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]) -> None:
    """One clear line instead of a read out of bounds."""
    if value.dim() != 4 or offsets.dim() != 6 or logits.dim() != 4 or reference_points.dim() != 4:
        raise ValueError(
            "deform_attn: expected value (B, S, M, D), offsets (B, Q, M, L, P, 2), logits (B, Q, M, L*P) and "
            f"reference_points (B, Q, L, 2 or 4); got {tuple(value.shape)}, {tuple(offsets.shape)}, "
            f"{tuple(logits.shape)}, {tuple(reference_points.shape)}"
        )
    batch, tokens, heads, _ = value.shape
    queries, levels, points = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "offsets": (offsets, (batch, queries, heads, levels, points, 2)),
        "logits": (logits, (batch, queries, heads, levels * points)),
        "reference_points": (reference_points, (batch, queries, levels, 4 if reference_points.shape[3] == 4 else 2)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"deform_attn: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != value.device:
            raise ValueError(f"deform_attn: {name} is on {tensor.device}, value on {value.device}; move one of them")
    areas = [height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
    if len(areas) != levels or min(sizes, default=0) < 1 or sum(areas) != tokens:
        raise ValueError(
            f"deform_attn: level_shapes {list(zip(sizes[::2], sizes[1::2], strict=True))} do not describe {levels} "
            f"levels of {tokens} tokens together; give (height, width) of every level of value"
        )


@torch.library.custom_op("dino_scale::deform_attn", mutates_args=())
def _forward(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int], impl: str
) -> Tensor:
    _check(value, offsets, logits, reference_points, sizes)
    return _implementation(impl).forward(value, offsets, logits, reference_points, sizes)


@_forward.register_fake
def _(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int], impl: str) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("dino_scale::deform_attn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    sizes: list[int],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(impl).backward(grad, value, offsets, logits, reference_points, sizes)


@_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    sizes: list[int],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(grad, *ctx.saved_tensors, ctx.sizes, ctx.impl)
    return *gradients, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("deform_attn has no second derivative; use impl='reference' where one is needed")


_forward.register_autograd(_autograd, setup_context=_save_inputs)
_backward.register_autograd(_no_second_derivative, setup_context=_save_nothing)


class _Implementation(NamedTuple):
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _implementation(impl: str) -> _Implementation:
    """Imported on first use, because numba and triton take a second to import."""
    if impl == "cpu":
        from kernels.deform_attn import cpu

        return _Implementation(cpu.forward, cpu.backward)
    try:
        from kernels.deform_attn import triton_backward, triton_forward, triton_window
    except ImportError as error:
        raise RuntimeError(
            f"deform_attn: impl='{impl}' needs triton ({error}); pip install triton or use impl='reference'"
        ) from error
    backward = triton_window.backward if impl == "triton_windowed" else triton_backward.backward
    return _Implementation(triton_forward.forward, backward)
