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
except ImportError as error:
    raise RuntimeError(
        f"deform_attn: impl='cpu' needs numba ({error}); pip install numba or use impl='reference'"
    ) from error
except RuntimeError as error:  # numba found no folder it may write
    raise RuntimeError(
        f"deform_attn: numba cannot keep its compiled code ({error}); set NUMBA_CACHE_DIR to a folder you can write"
    ) from error


READS_WORTH_SORTING = 4  # samples per cell and head


def forward(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]) -> Tensor:
    """(B, Q, M * D) in the dtype of `value`; arguments as checked by the operator."""
    batch, _, heads, channels = value.shape
    queries = offsets.shape[1]
    inputs = _arrays(value, offsets, logits, reference_points)
    output = torch.empty((batch, queries, heads, channels), dtype=_compute_dtype(value))
    run = functools.partial(cpu_loops.forward, *inputs, _levels(sizes), output.numpy())
    in_threads(run, batch * queries)
    return output.view(batch, queries, heads * channels).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits, each in the dtype of its tensor."""
    batch, tokens, heads, channels = value.shape
    queries, samples = offsets.shape[1], logits.shape[3]
    compute = _compute_dtype(value)
    # Rows of one head side by side stay in the cache; bringing them there and back pays where cells are read often.
    by_head = queries * samples > READS_WORTH_SORTING * tokens
    layout = (batch, heads, tokens, channels) if by_head else (batch, tokens, heads, channels)
    head_step, cell_step = (tokens * channels, channels) if by_head else (channels, heads * channels)
    inputs = (*_arrays(value.transpose(1, 2) if by_head else value, offsets, logits, reference_points), _levels(sizes))
    # A head owns its part of the value gradient, so ranges of (image, head) never write the same cell.
    gradients = (
        torch.zeros(layout, dtype=compute),
        torch.empty(offsets.shape, dtype=compute),
        torch.empty(logits.shape, dtype=compute),
    )
    run = functools.partial(
        cpu_loops.backward,
        _array(grad, compute).reshape(batch, -1, heads, channels),
        inputs,
        (tokens * heads * channels, head_step, cell_step),
        tuple(tensor.numpy() for tensor in gradients),
    )
    in_threads(run, batch * heads)
    grad_value, grad_offsets, grad_logits = gradients
    grad_value = (grad_value.transpose(1, 2) if by_head else grad_value).to(value.dtype).contiguous()
    return grad_value, grad_offsets.to(offsets.dtype), grad_logits.to(logits.dtype)


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _array(tensor: Tensor, dtype: torch.dtype) -> Any:
    return tensor.detach().to(dtype).contiguous().numpy()


def _arrays(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor) -> list[Any]:
    """As the loops take them. The weights are computed here: torch has vectors of exponentials, numba has not."""
    compute = _compute_dtype(value)
    weights = logits.detach().to(compute).softmax(-1)
    return [_array(tensor, compute) for tensor in (value, offsets, weights, reference_points)]


def _levels(sizes: list[int]) -> Any:
    """(L, 3) int64: height, width, first token of every level."""
    shapes = np.array(sizes, np.int64).reshape(-1, 2)
    areas = shapes[:, 0] * shapes[:, 1]
    return np.column_stack([shapes, np.cumsum(areas) - areas])
