"""Other people's kernels for deformable attention, called as their own modules call them.

Each adapter takes the arguments of `deform_attn` and does what a user of the peer has to do with them: locations,
softmax and casts count. A peer that is not installed is not measured; nothing takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.bench_official import OFFICIAL_OP, attention_by_official_op
from kernels.deform_attn.reference import sampling_locations

Shapes = Sequence[tuple[int, int]]
IMAGES_AT_ONCE = 64


def peers() -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name -> (module that must be importable, adapter)."""
    return {
        "official op": (OFFICIAL_OP, attention_by_official_op),
        "DCNv4 FlashDeformAttn": ("DCNv4", attention_by_dcnv4),
        "msda-triton": ("msda_triton", attention_by_msda_triton),
    }


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def level_tensors(level_shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, 2) int64 heights and widths, and (L,) int64 the first token of each level."""
    shapes = torch.tensor(list(level_shapes), device=device)
    areas = shapes.prod(1)
    return shapes, areas.cumsum(0) - areas


def attention_by_dcnv4(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Shapes
) -> Tensor:
    """FlashDeformAttn of DCNv4 (OpenGVLab/DCNv4), which takes float16: the caller's bfloat16 or float32 is cast.

    Its backward has no bfloat16, and it runs float32 under autocast as float16 too.
    """
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction
    shapes, starts = level_tensors(level_shapes, value.device)
    joined = dcnv4_samples(offsets, logits, reference_points, level_shapes)
    output = function.apply(value.half(), shapes, starts, joined, IMAGES_AT_ONCE, offsets.shape[4])
    return output.to(value.dtype)


def dcnv4_samples(offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Shapes) -> Tensor:
    """(B, Q, M, L * P * 3) float16: of one head first all locations, x before y, then all raw weights."""
    locations = sampling_locations(offsets.float(), reference_points, level_shapes).flatten(-3)
    return torch.cat([locations.half(), logits.half()], -1)


def attention_by_msda_triton(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Shapes
) -> Tensor:
    """rziga/msda-triton, which computes in float32 and knows no bfloat16.

    Its public function turns to grid_sample without a word when the kernel fails, so the kernel's own one is called.
    """
    frontend = importlib.import_module("msda_triton.frontend")
    arguments = msda_triton_arguments(value, offsets, logits, reference_points, level_shapes)
    output = frontend.triton_multiscale_deformable_attention(*arguments, "zeros", False)
    return output.flatten(2).to(value.dtype)


def msda_triton_arguments(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, level_shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value (B, S, M, D), shapes (L, 2), locations (B, Q, M, L, P, 2) and weights (B, Q, M, L, P), float32."""
    shapes, _ = level_tensors(level_shapes, value.device)
    locations = sampling_locations(offsets.float(), reference_points, level_shapes)
    return value.float(), shapes, locations, logits.float().softmax(-1).view(offsets.shape[:5])
