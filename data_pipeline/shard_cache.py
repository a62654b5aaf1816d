"""Copies of remote shards on this node, shared by its processes: downloaded once, the least recently used thrown out.

Layout: ROOT/DATASET/shard-00000.tar. A download has a lock of its own, so that different shards come at the same time;
the lock of ROOT is only held while room is made and while a finished copy gets its name. A download in progress counts
with its full size, because its `.partial` file has that size from the start.

A shard is opened before the lock is given back, and an open file survives being thrown out, so a reader never loses
what it is reading. With a limit readers close a shard after each image; otherwise the space would not come free.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.manifest import FileEntry
from data_pipeline.remote import Range, RemoteFolder
from dino_scale.errors import ConfigError, DataError

PIECE = 8 << 20  # bytes of a file asked for at once
GIGABYTE = 10**9
_PARTIAL = ".partial"
_PAUSE_SECONDS = 0.05  # before looking again whether another download has ended and may be thrown out


@dataclass(frozen=True)
class ShardCache:
    """folder: of one dataset, inside the folder that all datasets share. limit: bytes of all shards in the shared
    folder together; 0: no limit."""

    folder: Path
    limit: int = 0

    def require_room(self, shards: tuple[FileEntry, ...]) -> None:
        """ConfigError where a shard alone is larger than the limit."""
        largest = max((entry.size for entry in shards), default=0)
        if 0 < self.limit < largest:
            raise ConfigError(
                f"data.cache_gigabytes is {self.limit / GIGABYTE:g}: expected at least {largest / GIGABYTE:g}, the "
                "size of the largest shard, or 0 for no limit"
            )

    def open(self, remote: RemoteFolder, entry: FileEntry) -> int:
        """A descriptor of the shard on this node, copied first where it is not here. Raises DataError, OSError."""
        path = self.folder / entry.name
        with contextlib.suppress(FileNotFoundError):
            return _open_and_stamp(path, entry.size)
        with locked(_lock_of(path)):
            with contextlib.suppress(FileNotFoundError):
                return _open_and_stamp(path, entry.size)  # another process was faster
            partial = self._reserve(path, entry.size)
            download(remote, entry, partial)
            with locked(self._lock):
                os.replace(partial, path)
                return _open_and_stamp(path, entry.size)

    @property
    def _lock(self) -> Path:
        return self.folder.parent / "lock"

    def _reserve(self, path: Path, size: int) -> Path:
        """The file to download to, already of full size, when there is room for it.

        While other downloads take the room this waits: each of them ends, and what has ended can be thrown out.
        """
        partial = path.with_name(path.name + _PARTIAL)
        while True:
            with locked(self._lock):
                partial.unlink(missing_ok=True)  # of a process that died; this one holds the shard's lock
                if not self.limit or self._make_room(size):
                    with open(partial, "wb") as file:
                        file.truncate(size)
                    return partial
            time.sleep(_PAUSE_SECONDS)

    def _make_room(self, size: int) -> bool:
        """Throws out the shards used longest ago until `size` bytes more fit; False where they cannot yet."""
        shards = sorted(_stamped(self.folder.parent.glob("*/*.tar")))
        taken = sum(shard[1] for shard in shards) + self._being_downloaded()
        while shards and taken + size > self.limit:
            _, length, path = shards.pop(0)
            path.unlink()
            taken -= length
        return taken + size <= self.limit

    def _being_downloaded(self) -> int:
        """Bytes of the downloads in progress; what a killed process has left of one is removed."""
        taken = 0
        for _, size, partial in _stamped(self.folder.parent.glob(f"*/*.tar{_PARTIAL}")):
            if _held(_lock_of(partial.with_name(partial.name.removesuffix(_PARTIAL)))):
                taken += size
            else:
                partial.unlink()
        return taken


def download(remote: RemoteFolder, entry: FileEntry, partial: Path) -> None:
    """A whole file, checked by its SHA-256; where it cannot be had `partial` is removed and DataError raised."""
    digest = hashlib.sha256()
    try:
        with open(partial, "wb" if not partial.exists() else "r+b") as file:
            for start in range(0, entry.size, PIECE):
                wanted = Range(entry.name, start, min(PIECE, entry.size - start), lambda _: True)
                [piece] = remote.read([wanted])
                if isinstance(piece, DataError):
                    raise piece
                digest.update(piece)
                file.write(piece)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())  # a crash of the machine must not leave a whole name on half a file
        if digest.hexdigest() != entry.sha256:
            raise DataError(
                f"{remote.url}/{entry.name}: its SHA-256 is not the manifest's: copy or pack the dataset anew"
            )
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone on this node; the lock goes with the process that holds it, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.lock")


def _held(lock: Path) -> bool:
    """Whether somebody holds a lock."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _open_and_stamp(path: Path, size: int) -> int:
    """A descriptor of a file, whose time of change now says when it was last used. One of another size, torn or cut by
    whatever happened to the disk, is as good as none: FileNotFoundError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        raise FileNotFoundError(path)
    with contextlib.suppress(PermissionError):  # another user's copy; then that user's processes keep its time
        now = time.time_ns()  # finer than what the system would put there itself
        os.utime(descriptor, ns=(now, now))
    return descriptor


def _stamped(paths: Iterator[Path]) -> Iterator[tuple[int, int, Path]]:
    """(time of last use, bytes, path)."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            yield facts.st_mtime_ns, facts.st_size, path
