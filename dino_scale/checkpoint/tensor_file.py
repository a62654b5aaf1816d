"""Digests and headers of safetensors files, read without trusting them and without torch.

A file is 8 bytes with the length of the header (little-endian), the header (JSON, padded with spaces to 8 bytes), and
the tensors one after the other. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
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

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


def header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file whose data are those tensors in that order; metadata: texts by name."""
    table: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.bytes
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes, as the library writes it
    return len(text).to_bytes(8, "little") + text


def in_file_order(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Wider elements first, which keeps every tensor aligned to its elements, then by name, as the library writes."""
    return dict(sorted(entries.items(), key=lambda item: (-_SIZES[item[1].dtype], item[0])))


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
