"""Deformable attention on the CPU: torch tensors in, numba loops, torch tensors out.

The loops are serial and release the interpreter lock; threads run them on disjoint ranges of work. This follows
torch's thread count call by call, is safe from any thread, and every result is the same for any number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.threads import in_threads

try:
    from kernels.deform_attn import cpu_loops
    from kernels.deform_attn.lines import LINE_BYTES
except ImportError as error:
    raise RuntimeError(
        f"deform_attn: impl='cpu' needs numba ({error}); pip install numba or use impl='reference'"
    ) from error
except RuntimeError as error:  # numba found no folder it may write
    raise RuntimeError(
        f"deform_attn: numba cannot keep its compiled code ({error}); set NUMBA_CACHE_DIR to a folder you can write"
    ) from error


READS_WORTH_SORTING = 4  # samples per cell and head
BANDS = 16  # of a map, to order queries in


def forward(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]) -> Tensor:
    """(B, Q, M * D) in the dtype of `value`; arguments as checked by the operator."""
    batch, _, heads, channels = value.shape
    queries, compute = offsets.shape[1], _compute_dtype(value)
    rows = _whole_lines(value, compute)
    output = torch.empty((batch, queries, heads, rows.shape[3]), dtype=compute)
    run = functools.partial(
        cpu_loops.forward,
        rows.numpy(),
        _inputs(offsets, logits, reference_points, sizes, compute),
        _order(reference_points),
        output.numpy(),
    )
    in_threads(run, batch * queries)
    return output[..., :channels].flatten(2).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits, each in the dtype of its tensor."""
    batch, tokens, heads, channels = value.shape
    queries, samples = offsets.shape[1], logits.shape[3]
    compute = _compute_dtype(value)
    # Rows of one head side by side stay in the cache; bringing them there and back pays where cells are read often.
    by_head = queries * samples > READS_WORTH_SORTING * tokens
    rows = _whole_lines(value.transpose(1, 2) if by_head else value, compute)
    row = rows.shape[3]
    head_step, cell_step = (tokens * row, row) if by_head else (row, heads * row)
    inputs = _inputs(offsets, logits, reference_points, sizes, compute)
    # A head owns its part of the value gradient, so ranges of (image, head) never write the same cell.
    # The loops have read offsets and weights of a sample before they write its gradients, which may take their place.
    copied = offsets.dtype != compute  # otherwise they may be the caller's own
    gradients = (
        torch.zeros_like(rows),
        torch.from_numpy(inputs[0]) if copied else torch.empty(inputs[0].shape, dtype=compute),
        torch.from_numpy(inputs[1]),
    )
    run = functools.partial(
        cpu_loops.backward,
        _whole_lines(grad.view(batch, queries, heads, channels), compute).numpy(),
        rows.numpy(),
        inputs,
        _order(reference_points),
        (tokens * heads * row, head_step, cell_step),
        tuple(tensor.numpy() for tensor in gradients),
    )
    in_threads(run, batch * heads)
    grad_value, grad_offsets, grad_logits = gradients
    grad_value = (grad_value.transpose(1, 2) if by_head else grad_value)[..., :channels].to(value.dtype).contiguous()
    grad_offsets = grad_offsets[:, :, :, :samples].to(offsets.dtype).contiguous().view(offsets.shape)
    return grad_value, grad_offsets, grad_logits[..., :samples].to(logits.dtype).contiguous()


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _whole_lines(tensor: Tensor, compute: torch.dtype, dim: int = -1) -> Tensor:
    """Contiguous, in the dtype of the loops, its dimension `dim` filled up with zeros to whole lines of numbers."""
    tensor = tensor.detach().to(compute, memory_format=torch.contiguous_format)  # one copy, also of a transposed one
    missing = -tensor.shape[dim] % (LINE_BYTES // compute.itemsize)
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim:][1:])], dim)
    return tensor.contiguous()


def _inputs(
    offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int], compute: torch.dtype
) -> tuple[Any, ...]:
    """offsets, weights, sizes, origins and places, as the loops take them.

    The weights are computed here: torch has vectors of exponentials, numba has not.
    """
    weights = _whole_lines(logits.detach().to(compute).softmax(-1), compute).numpy()
    filled = weights.shape[3]
    references = reference_points.detach().to(compute).flatten(0, 1).contiguous().numpy()
    shapes = np.array(sizes, np.int64).reshape(-1, 2)
    areas = shapes[:, 0] * shapes[:, 1]
    levels = np.column_stack([shapes, np.cumsum(areas) - areas])
    # Samples that only fill up a line are nowhere: NaN is inside of no map.
    origins, maps = np.zeros(filled, np.int64), np.ones((2, filled), weights.dtype)
    places = np.full((len(references), 4, filled), np.nan, weights.dtype)
    cpu_loops.place_samples(references, levels, offsets.shape[4], maps, origins, places)
    return _whole_lines(offsets.flatten(3, 4), compute, -2).numpy(), weights, maps, origins, places


def _order(reference_points: Tensor) -> Any:
    """(B * Q,) int64: flat query indices, within each image along bands of the map, to and fro.

    So a query finds in the cache the cells that those before it have read.
    """
    batch, queries = reference_points.shape[:2]
    first = reference_points[:, :, 0].detach().numpy()
    with np.errstate(invalid="ignore", over="ignore"):  # broken references have no neighbours: any place will do
        band = np.floor(first[..., 1] * BANDS)
        along = 2 * band + np.where(band % 2 == 0, first[..., 0], 1 - first[..., 0])
    nearby = np.argsort(along, kind="stable")
    return (nearby + queries * np.arange(batch)[:, None]).reshape(-1)
