"""What a checkpoint holds, from its manifest alone; its digests on request. Needs neither torch nor DeepSpeed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dino_scale.checkpoint.manifest import Manifest, read_manifest
from dino_scale.checkpoint.tensor_file import digest_file


@dataclass(frozen=True)
class FileState:
    """One file of a checkpoint. problem: what is wrong with it, empty when nothing is (or was looked for)."""

    name: str
    bytes: int
    pieces: int
    problem: str = ""


@dataclass(frozen=True)
class Inspection:
    """elements: trained parameters, each counted once; tensors: their number. verified: digests were compared."""

    manifest: Manifest
    elements: int
    tensors: int
    bytes: int
    files: tuple[FileState, ...]
    verified: bool

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"{state.name}: {state.problem}" for state in self.files if state.problem)


def inspect(folder: Path, verify: bool = False) -> Inspection:
    """Look at the checkpoint `folder`; with `verify`, also read every file and compare its digest.

    Files that are missing or of another size are found either way. CheckpointError for an unreadable manifest.
    """
    manifest = read_manifest(folder)
    pieces = [piece.file for held in manifest.pieces.values() for piece in held]
    files = tuple(
        FileState(name, entry.bytes, pieces.count(name), _problem(folder / name, manifest, verify))
        for name, entry in sorted(manifest.files.items())
    )
    sizes = [math.prod(shape) for shape in manifest.parameters.values()]
    return Inspection(manifest, sum(sizes), len(sizes), sum(state.bytes for state in files), files, verify)


def _problem(path: Path, manifest: Manifest, verify: bool) -> str:
    entry = manifest.files[path.name]
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry.bytes:
        return f"{path.stat().st_size} bytes, expected {entry.bytes}"
    if verify and digest_file(path) != entry:
        return "sha256 differs from the manifest"
    return ""
