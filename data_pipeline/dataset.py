"""Opens packed data wherever it is: a folder, or an address whose index (and shards, if asked) is copied to this node.

A node's processes share one copy under a file lock; whoever comes first makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.index import Index
from data_pipeline.manifest import MANIFEST, FileEntry, read_manifest
from data_pipeline.remote import Range, RemoteFolder
from dino_scale.errors import DataError

PIECE = 8 << 20  # bytes of a shard asked for at once


def is_remote(location: str | Path) -> bool:
    return isinstance(location, str) and ("://" in location or location.startswith("pipe:"))


def open_dataset(location: str | Path, cache: str = "", cache_shards: bool = False) -> Index:
    """A packed dataset. location: a folder, or an address such as s3://bucket/shards/train.

    cache: folder on this node for what is copied from an address; empty: one in the system's temporary folder.
    cache_shards: copy each shard when it is first read, instead of asking for one image at a time.
    Raises DataError where it is incomplete or altered, ConfigError for an address that is not supported.
    """
    if not is_remote(location):
        return Index.open(Path(location))
    return open_remote(RemoteFolder(str(location).rstrip("/")), cache, cache_shards)


def open_remote(remote: RemoteFolder, cache: str = "", cache_shards: bool = False) -> Index:
    """As `open_dataset`, with one's own settings for requests."""
    text = remote.whole(MANIFEST)
    root = Path(cache) if cache else Path(tempfile.gettempdir()) / f"dino-scale-{os.getuid()}"
    folder = root / hashlib.sha256(text).hexdigest()[:32]
    (folder / "index").mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        _write_whole(folder / MANIFEST, text)
        for entry in read_manifest(folder).columns:
            copy_file(remote, entry, folder)
    index = Index.open(folder, shards_here=False)
    index.remote = remote
    index.cache_shards = cache_shards
    return index


def shard_here(index: Index, shard: int) -> Path:
    """The path of a shard on this node, copied first where it is not here yet. Raises DataError."""
    entry = index.manifest.shards[shard]
    path = index.folder / entry.name
    if index.remote is not None and not path.exists():
        with locked(index.folder / f"{entry.name}.lock"):
            copy_file(index.remote, entry, index.folder)
    return path


def copy_file(remote: RemoteFolder, entry: FileEntry, folder: Path) -> None:
    """A file of a dataset onto this node, checked by its SHA-256; one that is here already is left."""
    path = folder / entry.name
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    digest = hashlib.sha256()
    with open(partial, "wb") as file:
        for start in range(0, entry.size, PIECE):
            wanted = Range(entry.name, start, min(PIECE, entry.size - start), lambda _: True)
            [piece] = remote.read([wanted])
            if isinstance(piece, DataError):
                partial.unlink()
                raise piece
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != entry.sha256:
        partial.unlink()
        raise DataError(f"{remote.url}/{entry.name}: its SHA-256 is not the manifest's: copy or pack the dataset anew")
    os.replace(partial, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone on this node; the lock goes with the process that holds it, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
