"""The table of contents of a checkpoint: manifest.json names every file, its digest and every tensor's pieces."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino_scale.errors import CheckpointError

FORMAT = "dino-scale checkpoint"
VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One data file: bytes on disk and sha256 of its content in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter lie in `file`, one tensor per kind (`tensor_key`)."""

    file: str
    start: int
    numel: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except the numbers.

    step: optimizer steps done in the stage, skipped ones included. optimizer_steps: AdamW's own count.
    samples_seen: position in the stage's sample stream (the data cursor). world_size, zero_stage: of the writing run,
    for information only. index_digest: of the training set's index. parameters: global shape by name.
    pieces: where the elements of each parameter lie. kinds: "fp32", "exp_avg", "exp_avg_sq" and, with averaging, "ema".
    """

    step: int
    optimizer_steps: int
    skipped_steps: int
    samples_seen: int
    seed: int
    world_size: int
    zero_stage: int
    index_digest: str
    kinds: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    pieces: dict[str, tuple[Piece, ...]]
    files: dict[str, FileEntry]
    libraries: dict[str, str]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)


def tensor_key(kind: str, name: str, start: int) -> str:
    """Name inside a safetensors file of one piece of one kind of one parameter."""
    return f"{kind}:{name}:{start}"


def read_manifest(folder: Path) -> Manifest:
    """Parse `folder`/manifest.json; CheckpointError names what is wrong with it."""
    path = folder / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {FILE_NAME} is missing, the checkpoint is torn") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}), the checkpoint is torn") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not a manifest of '{FORMAT}'")
    version = data.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{path}: format version {version}, expected {VERSION}: use the dino-scale that wrote it")
    try:
        return _decode(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: field missing or of the wrong form ({error!r})") from None


def _decode(data: dict[str, Any]) -> Manifest:
    data["kinds"] = tuple(data["kinds"])
    data["parameters"] = {name: tuple(shape) for name, shape in data["parameters"].items()}
    data["pieces"] = {name: tuple(Piece(**piece) for piece in pieces) for name, pieces in data["pieces"].items()}
    data["files"] = {_plain_name(name): FileEntry(**entry) for name, entry in data["files"].items()}
    unknown = {piece.file for pieces in data["pieces"].values() for piece in pieces} - data["files"].keys()
    if unknown:
        raise ValueError(f"pieces lie in {sorted(unknown)[0]!r}, which is not among the files")
    return Manifest(**data)


def _plain_name(name: str) -> str:
    if not name or Path(name).name != name:
        raise ValueError(f"file name {name!r} leaves the folder")
    return name


def digest_file(path: Path) -> FileEntry:
    """Size and sha256 of a file, read once in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileEntry(path.stat().st_size, digest.hexdigest())


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files all exist with the size and digest written; else CheckpointError."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        verify_file(folder, name, entry)
    return manifest


def verify_file(folder: Path, name: str, entry: FileEntry) -> None:
    """CheckpointError unless the file exists with the size and digest written."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, the checkpoint is torn")
    if path.stat().st_size != entry.bytes:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected {entry.bytes}: truncated or altered")
    if digest_file(path) != entry:
        raise CheckpointError(f"{path}: sha256 differs from the manifest: altered after it was written")
