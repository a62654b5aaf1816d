"""Safetensors files written as a stream, their digest taken on the way (format: `tensor_file.py`).

Hashing and writing release the interpreter's lock, so a thread can do both while training goes on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dino_scale.checkpoint.tensor_file import FileEntry, TensorEntry, header

_BLOCK = 4 << 20  # bytes hashed and written at a time
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write contiguous CPU tensors to a new file and sync it; its size and digest, taken on the way."""
    # Wider elements first keep every tensor aligned to its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    digest = hashlib.sha256()
    with path.open("xb", buffering=1 << 20) as file:
        for block in _blocks(ordered):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return FileEntry(file.tell(), digest.hexdigest())


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield header({name: TensorEntry(_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()})
    for tensor in tensors.values():
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), _BLOCK):
            yield content[begin : begin + _BLOCK]
