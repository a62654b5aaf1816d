"""Checking a checkpoint by all ranks together: each reads a share of the files, and all come to one answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dino_scale.checkpoint.manifest import Manifest, read_manifest, require_sizes, verify_files
from dino_scale.checkpoint.tensor_file import FileEntry
from dino_scale.errors import CheckpointError
from dino_scale.training import distributed


def verify_together(folder: Path) -> Manifest:
    """`manifest.verify` with the files dealt to the ranks, so that no file is read by two. Call on every rank.

    The manifest that rank 0 reads counts for all. CheckpointError, the same on every rank, when any file is damaged.
    """
    manifest = distributed.on_rank_zero(lambda: _read(folder))
    problem: CheckpointError | None = None
    try:
        verify_files(folder, manifest, share(manifest.files, distributed.rank(), distributed.world_size()))
    except CheckpointError as error:
        problem = error
    except OSError as error:  # of this rank alone; the others must hear of it
        problem = CheckpointError(f"{folder}: cannot be read on rank {distributed.rank()} ({error})")
    for found in distributed.gather_objects(problem):
        if found is not None:
            raise found
    return manifest


def _read(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    require_sizes(folder, manifest)
    return manifest


def share(files: Mapping[str, FileEntry], rank: int, world: int) -> list[str]:
    """The files that `rank` reads: each in turn, the largest first, goes to the rank that has least so far."""
    loads = [0] * world
    own = []
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = loads.index(min(loads))
        loads[least] += max(1, files[name].bytes)
        if least == rank:
            own.append(name)
    return own
