"""Safetensors files: written as a stream with their digest, and headers read without trusting them.

A file is 8 bytes with the length of the header (little-endian), the header (JSON, padded with spaces to 8 bytes), and
the tensors one after the other. https://github.com/huggingface/safetensors#format
Hashing and writing release the interpreter's lock, so a thread can do both while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_scale.checkpoint import strict_json
from dino_scale.errors import CheckpointError

_BLOCK = 4 << 20  # bytes hashed and written at a time
_METADATA = "__metadata__"
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
_SIZES = {name: dtype.itemsize for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class FileEntry:
    """One data file: bytes on disk and sha256 of its content in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor: dtype as safetensors names it, for example "F32"."""

    dtype: str
    shape: tuple[int, ...]


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
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), _BLOCK):
            yield content[begin : begin + _BLOCK]


def digest_file(path: Path) -> FileEntry:
    """Size and sha256 of a file, read once in blocks."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def read_header(path: Path, longest: int) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file says it holds; CheckpointError unless they fill it exactly.

    longest: bytes that the header may have. Nothing is allocated by sizes that the file only claims.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: its header is said to have {length} bytes, the file has {size}: altered")
        if length > longest:
            raise CheckpointError(f"{path}: a header of {length} bytes, at most {longest} expected: altered")
        text = file.read(length)
    try:
        return _decode_header(strict_json.parse(text), size - 8 - length)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is not that of a safetensors file ({error})") from None


def _decode_header(header: dict[str, Any], size: int) -> dict[str, TensorEntry]:
    header.pop(_METADATA, None)
    entries, spans = {}, []
    for name, item in header.items():
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has shape {list(shape)} at {[begin, end]}")
        if end - begin != math.prod(shape) * _SIZES[dtype]:
            raise ValueError(f"{name} of {dtype} {list(shape)} does not fit into bytes {begin} to {end}")
        entries[name] = TensorEntry(dtype, shape)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"tensors overlap or leave a hole at byte {min(begin, position)}")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
    return entries
