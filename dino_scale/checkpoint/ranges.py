"""Checkpoint shards by byte range: any stretch of a parameter with exact reads, and files larger than memory.

The safetensors library maps whole files and hands out whole tensors; here a read is one `pread` of exactly the bytes
asked for, into the destination's own memory, and a file is written piece by piece (format: `tensor_file.py`).
Everything in a shard is a float32 vector. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from dino_scale.checkpoint.manifest import Manifest, tensor_key
from dino_scale.checkpoint.tensor_file import FileEntry, TensorEntry, header, read_header
from dino_scale.errors import CheckpointError

ITEM = 4  # bytes of a float32
_LONGEST_HEADER = 100 << 20  # bytes; the safetensors library refuses longer ones too
_OPEN_FILES = 64  # a checkpoint of a thousand workers must not need a thousand file descriptors


class Shard:
    """One file of a checkpoint, open for reading. CheckpointError when it is no file of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = read_header(path, _LONGEST_HEADER)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}), the checkpoint is damaged") from None

    def entries(self) -> dict[str, TensorEntry]:
        """What the file's header says that it holds."""
        return dict(self._tensors)

    def read_bytes(self, key: str, first: int, target: memoryview) -> None:
        """Fill `target` with the bytes of tensor `key`, of any type, from its byte `first` on."""
        _read_exactly(self.path, self._descriptor, self._tensors[key].begin + first, target)

    def read_into(self, key: str, first: int, target: memoryview) -> None:
        """Fill `target` (bytes) with the elements of tensor `key` from `first` on."""
        tensor = self._tensors.get(key)
        last = first + len(target) // ITEM
        if tensor is None or tensor.dtype != "F32" or not 0 <= first <= last <= math.prod(tensor.shape):
            raise CheckpointError(f"{self.path}: holds no float32 elements {first} to {last} under '{key}': altered")
        _read_exactly(self.path, self._descriptor, tensor.begin + ITEM * first, target)

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
    """Writes a file in the order of its table of contents, without ever holding it in memory."""

    def __init__(
        self, path: Path, contents: Mapping[str, TensorEntry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """contents: every tensor, in the order in which they will be written; metadata: texts in the file's header."""
        self.path = path
        self._missing = sum(entry.bytes for entry in contents.values())
        self._digest = hashlib.sha256()
        self._file = path.open("xb")
        self._put(header(contents, metadata))

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


def vector(numel: int) -> TensorEntry:
    """How a shard holds a piece of a parameter."""
    return TensorEntry("F32", (numel,))


def _read_exactly(path: Path, descriptor: int, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}), the checkpoint is damaged") from None
        if count == 0:
            raise CheckpointError(f"{path}: ends before byte {offset + len(target)}: truncated")
        done += count
