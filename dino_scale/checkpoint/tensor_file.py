"""Digests and headers of safetensors files, read without trusting them and without torch.

A file is 8 bytes with the length of the header (little-endian), the header (JSON, padded with spaces to 8 bytes), and
the tensors one after the other. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino_scale.checkpoint import strict_json
from dino_scale.errors import CheckpointError

_BLOCK = 4 << 20  # bytes read at a time
_METADATA = "__metadata__"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class FileEntry:
    """One data file: bytes on disk and sha256 of its content in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor: dtype as safetensors names it, for example "F32"; begin: its place in the file,
    in bytes, which does not make two entries differ."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = field(default=0, compare=False)


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
        return _decode_header(strict_json.parse(text), 8 + length, size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is not that of a safetensors file ({error})") from None


def _decode_header(header: dict[str, Any], data: int, size: int) -> dict[str, TensorEntry]:
    header.pop(_METADATA, None)
    entries, spans = {}, []
    for name, item in header.items():
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has shape {list(shape)} at {[begin, end]}")
        if end - begin != math.prod(shape) * _SIZES[dtype]:
            raise ValueError(f"{name} of {dtype} {list(shape)} does not fit into bytes {begin} to {end}")
        entries[name] = TensorEntry(dtype, shape, data + begin)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"tensors overlap or leave a hole at byte {min(begin, position)}")
        position = end
    if position != size - data:
        raise ValueError(f"its tensors end at byte {position} of {size - data}")
    return entries
