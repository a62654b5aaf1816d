"""Checkpoint shards by byte range: any stretch of a parameter with exact reads, and files larger than memory.

The safetensors library maps whole files and hands out whole tensors; here a read is one `pread` of exactly the bytes
asked for, into the destination's own memory, and a file is written piece by piece. The format (safetensors 0.4 on) is
eight bytes with the length of a JSON header, the header (dtype, shape and byte offsets of every tensor), the data.
Everything in a shard is float32. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dino_scale.checkpoint.manifest import FileEntry, Manifest, tensor_key
from dino_scale.errors import CheckpointError

ITEM = 4  # bytes of a float32
_HEADER_LIMIT = 100 << 20  # bytes; the safetensors library refuses longer ones too
_OPEN_FILES = 64  # a checkpoint of a thousand workers must not need a thousand file descriptors


class Shard:
    """One shard file, open for reading. CheckpointError when its header is not that of float32 tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing, the checkpoint is torn") from None
        try:
            self._spans = _spans(path, self._descriptor)
        except BaseException:
            self.close()
            raise

    def read_into(self, key: str, first: int, target: memoryview) -> None:
        """Fill `target` (bytes) with the elements of tensor `key` from `first` on."""
        begin, end = self._spans.get(key, (0, -1))
        offset = begin + ITEM * first
        if first < 0 or offset + len(target) > end:
            raise CheckpointError(
                f"{self.path}: holds no {len(target) // ITEM} elements from {first} on under '{key}', as the manifest "
                "says: altered after it was written"
            )
        _read_exactly(self.path, self._descriptor, offset, target)

    def close(self) -> None:
        os.close(self._descriptor)


class ParameterReader:
    """Reads stretches of parameters from the shards of a checkpoint, whoever wrote which piece; use as a context.

    bytes_read: of tensor data so far.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self.bytes_read = 0

    def __enter__(self) -> ParameterReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def read_into(self, kind: str, name: str, start: int, target: memoryview) -> None:
        """Fill `target` (bytes) with `kind` of the flattened parameter `name` from element `start` on."""
        position, end = start, start + len(target) // ITEM
        for piece in self._manifest.pieces.get(name, ()):
            last = min(piece.start + piece.numel, end)
            if piece.start <= position < last:
                part = target[ITEM * (position - start) : ITEM * (last - start)]
                key = tensor_key(kind, name, piece.start)
                self._shard(piece.file).read_into(key, position - piece.start, part)
                self.bytes_read += len(part)
                position = last
        if position != end:
            raise CheckpointError(
                f"{self._folder}: {kind} of parameter {name} ends at element {position} of the {end} that are needed: "
                "its manifest is incomplete"
            )

    def _shard(self, name: str) -> Shard:
        if name in self._shards:
            self._shards.move_to_end(name)
        else:
            if len(self._shards) == _OPEN_FILES:
                self._shards.popitem(last=False)[1].close()
            self._shards[name] = Shard(self._folder / name)
        return self._shards[name]


class ShardWriter:
    """Writes a shard in the order of its table of contents, without ever holding it in memory."""

    def __init__(self, path: Path, contents: Sequence[tuple[str, int]]) -> None:
        """contents: key and number of elements of every tensor, in the order in which they will be written."""
        self.path = path
        self._missing = ITEM * sum(numel for _, numel in contents)
        self._digest = hashlib.sha256()
        self._file = path.open("xb")
        self._put(_header(contents))

    def write(self, data: memoryview | bytes) -> None:
        self._missing -= len(data)
        self._put(data)

    def close(self) -> FileEntry:
        """Sync the file; its size and digest. ValueError when more or less was written than announced."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if self._missing:
            raise ValueError(f"{self.path}: {self._missing} bytes fewer were written than announced")
        return FileEntry(size, self._digest.hexdigest())

    def _put(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def _header(contents: Sequence[tuple[str, int]]) -> bytes:
    table, offset = {}, 0
    for key, numel in contents:
        table[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + ITEM * numel]}
        offset += ITEM * numel
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes, as the library writes it
    return len(text).to_bytes(8, "little") + text


def _spans(path: Path, descriptor: int) -> dict[str, tuple[int, int]]:
    """Begin and end in the file, in bytes, of every tensor."""
    size = os.fstat(descriptor).st_size
    prefix = bytearray(8)
    _read_exactly(path, descriptor, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}: not a safetensors file")
    text = bytearray(length)
    _read_exactly(path, descriptor, 8, memoryview(text))
    try:
        table = json.loads(text.decode())
        table.pop("__metadata__", None)
        return {key: _span(entry, 8 + length, size) for key, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is not that of float32 tensors ({error!r})") from None


def _span(entry: dict[str, Any], data: int, size: int) -> tuple[int, int]:
    first, last = (data + int(offset) for offset in entry["data_offsets"])
    if entry["dtype"] != "F32" or not data <= first <= last <= size:
        raise ValueError(f"{entry['dtype']} at bytes {first} to {last} of {size}")
    return first, last


def _read_exactly(path: Path, descriptor: int, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path}: ends before byte {offset + len(target)}: truncated")
        done += count
