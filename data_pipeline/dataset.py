"""Opens packed data wherever it is: a folder, or an address whose index (and shards, if asked) is copied to this node.

A node's processes share one copy under a file lock; whoever comes first makes it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from data_pipeline.index import Index
from data_pipeline.manifest import MANIFEST, FileEntry, read_manifest
from data_pipeline.remote import RemoteFolder
from data_pipeline.shard_cache import GIGABYTE, ShardCache, download, locked


def is_remote(location: str | Path) -> bool:
    return isinstance(location, str) and ("://" in location or location.startswith("pipe:"))


def open_dataset(
    location: str | Path, cache: str = "", cache_shards: bool = False, cache_gigabytes: float = 0.0
) -> Index:
    """A packed dataset. location: a folder, or an address such as s3://bucket/shards/train.

    cache: folder on this node for what is copied from an address; empty: one in the system's temporary folder.
    cache_shards: copy each shard when it is first read, instead of asking for one image at a time.
    cache_gigabytes: of 10^9 bytes, all shards in the cache folder together; 0: no limit.
    Raises DataError where it is incomplete or altered, ConfigError for an address that is not supported and for a
    limit below the size of a shard.
    """
    if not is_remote(location):
        return Index.open(Path(location))
    limit = round(cache_gigabytes * GIGABYTE)
    return open_remote(RemoteFolder(str(location).rstrip("/")), cache, cache_shards, limit)


def open_remote(remote: RemoteFolder, cache: str = "", cache_shards: bool = False, cache_limit: int = 0) -> Index:
    """As `open_dataset`, with one's own settings for requests. cache_limit: bytes."""
    text = remote.whole(MANIFEST)
    root = Path(cache) if cache else Path(tempfile.gettempdir()) / f"dino-scale-{os.getuid()}"
    folder = root / hashlib.sha256(text).hexdigest()[:32]
    (folder / "index").mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        _write_whole(folder / MANIFEST, text)
        for entry in read_manifest(folder).columns:
            _copy_column(remote, entry, folder)
    index = Index.open(folder, shards_here=False)
    index.remote = remote
    if cache_shards:
        index.cache = ShardCache(folder, cache_limit)
        index.cache.require_room(index.manifest.shards)
    return index


def open_shard(index: Index, shard: int) -> int:
    """A descriptor of a shard on this node, copied first where it is not here yet. Raises DataError, OSError."""
    entry = index.manifest.shards[shard]
    if index.remote is not None and index.cache is not None:
        return index.cache.open(index.remote, entry)
    return os.open(index.folder / entry.name, os.O_RDONLY | os.O_CLOEXEC)


def _copy_column(remote: RemoteFolder, entry: FileEntry, folder: Path) -> None:
    """A column of the index onto this node; one that is here already is left."""
    path = folder / entry.name
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    download(remote, entry, partial)
    os.replace(partial, path)


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
