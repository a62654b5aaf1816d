"""A checkpoint rewritten into another number of shards, in little memory and without torch, DeepSpeed or a GPU.

Training does not need this: any number of workers reads any checkpoint, each its own ranges (`store.load`). It serves
file systems that like fewer or smaller files, and archives.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dino_scale.checkpoint.layout import sync, write_synced
from dino_scale.checkpoint.manifest import FILE_NAME, Manifest, Piece, tensor_key, verify
from dino_scale.checkpoint.ranges import ITEM, ParameterReader, ShardWriter, vector
from dino_scale.checkpoint.tensor_file import FileEntry
from dino_scale.errors import UserError

_BLOCK = 4 << 20  # bytes that are in memory at once


def reshard(source: Path, target: Path, parts: int) -> None:
    """Write the checkpoint `source` as the new folder `target` with `parts` shards of equal size; the same numbers.

    The digests of `source` are checked first. Memory: a few megabytes, whatever the size. The result appears by one
    rename. UserError for a `target` that exists or parts that cannot be; CheckpointError for a damaged `source`.
    """
    if target.exists():
        raise UserError(f"{target} exists: give the name of a new folder")
    manifest = verify(source)
    total = elements(manifest)
    if not 1 <= parts <= max(total, 1):
        raise UserError(f"{parts} parts: expected 1 to {max(total, 1)}, the number of elements")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rewritten = _rewrite(source, manifest, partial, parts)
        write_synced(partial / FILE_NAME, rewritten.to_json())
        sync(partial)
        os.rename(partial, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def elements(manifest: Manifest) -> int:
    """Number of trained parameters of a checkpoint, each counted once whatever the kinds."""
    return sum(math.prod(shape) for shape in manifest.parameters.values())


def _rewrite(source: Path, manifest: Manifest, folder: Path, parts: int) -> Manifest:
    """Write all files of the new checkpoint but the manifest, which is returned."""
    files: dict[str, FileEntry] = {}
    pieces: dict[str, list[Piece]] = {}
    with ParameterReader(source, manifest) as reader:
        for part, stretch in enumerate(_cut(manifest, parts)):
            name = f"shard-{part:05d}.safetensors"
            files[name] = _write_shard(folder / name, manifest.kinds, stretch, reader)
            for parameter, start, numel in stretch:
                pieces.setdefault(parameter, []).append(Piece(name, start, numel))
    shards = {piece.file for held in manifest.pieces.values() for piece in held}
    for name in manifest.files.keys() - shards:  # frozen parameters and buffers
        files[name] = _copy(source / name, folder / name, manifest.files[name])
    return replace(manifest, files=files, pieces={name: tuple(held) for name, held in pieces.items()})


def _cut(manifest: Manifest, parts: int) -> Iterator[list[tuple[str, int, int]]]:
    """Per part the stretches (name, start, numel) that it holds: all parameters in a row, cut in equal lengths."""
    places, offset = [], 0
    for name, shape in manifest.parameters.items():
        places.append((name, offset, math.prod(shape)))
        offset += math.prod(shape)
    for part in range(parts):
        begin, end = offset * part // parts, offset * (part + 1) // parts
        stretches = []
        for name, first, numel in places:
            low, high = max(begin, first), min(end, first + numel)
            if low < high:
                stretches.append((name, low - first, high - low))
        yield stretches


def _write_shard(
    path: Path, kinds: tuple[str, ...], stretches: list[tuple[str, int, int]], reader: ParameterReader
) -> FileEntry:
    planned = [(kind, *stretch) for kind in kinds for stretch in stretches]
    writer = ShardWriter(path, {tensor_key(kind, name, start): vector(numel) for kind, name, start, numel in planned})
    block = memoryview(bytearray(_BLOCK))
    for kind, name, start, numel in planned:
        for first in range(0, numel, _BLOCK // ITEM):
            part = block[: ITEM * min(numel - first, _BLOCK // ITEM)]
            reader.read_into(kind, name, start + first, part)
            writer.write(part)
    return writer.close()


def _copy(source: Path, target: Path, entry: FileEntry) -> FileEntry:
    shutil.copyfile(source, target)
    sync(target)
    return entry
