"""The table of contents of a checkpoint: manifest.json names every file, its digest and every tensor's pieces.

Whoever can write into a checkpoint's folder can write anything there, so what is read is believed only as far as it is
consistent: `verify` checks types, ranges, that the pieces cover every parameter once, and that every file is what the
manifest says, before a number of it is used for anything.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dino_scale.checkpoint import strict_json
from dino_scale.checkpoint.tensor_file import FileEntry, TensorEntry, digest_file, read_header
from dino_scale.errors import CheckpointError

FORMAT = "dino-scale checkpoint"
VERSION = 2
RANDOM_RULE = 1  # draws come from seed, step and microbatch as training/determinism.py derives them
FILE_NAME = "manifest.json"
COMMON = "common.safetensors"

_LONGEST = 256 << 20  # bytes; a million pieces need about half of it
_LONGEST_COMMON_HEADER = 16 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ELEMENT_BYTES = 4  # all kinds are float32


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter lie in `file`, one tensor per kind (`tensor_key`)."""

    file: str
    start: int
    numel: int


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: `metric` had `value` after `step`."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Position:
    """Where a run stands, apart from its tensors; fields as in Manifest."""

    step: int
    skipped_steps: int
    samples_seen: int
    seed: int
    index_digest: str
    best: Best | None = None


@dataclass(frozen=True)
class Group:
    """A parameter group of the writing run: its rate at schedule factor 1, its decay, the number of its tensors."""

    learning_rate: float
    weight_decay: float
    tensors: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except the numbers.

    step: optimizer steps done in the stage, skipped ones included. optimizer_steps: AdamW's own count.
    samples_seen: position in the stage's sample stream (the data cursor). world_size, zero_stage: of the writing run,
    for information only. index_digest: of the training set's index. parameters: global shape by name.
    pieces: where the elements of each parameter lie. kinds: "fp32", "exp_avg", "exp_avg_sq" and, with averaging, "ema".
    bf16_parameters: whether the writing run computed with bf16 parameters (what is saved are its float32 masters), and
    groups: by name, both for information. random_rule: which version of the rule behind random draws the run follows
    (training/determinism.py); another one would go on with other draws.
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
    best: Best | None = None
    bf16_parameters: bool = False
    groups: dict[str, Group] = field(default_factory=dict)
    random_rule: int = RANDOM_RULE

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, allow_nan=False)


def tensor_key(kind: str, name: str, start: int) -> str:
    """Name inside a safetensors file of one piece of one kind of one parameter."""
    return f"{kind}:{name}:{start}"


def read_manifest(folder: Path) -> Manifest:
    """Parse `folder`/manifest.json; CheckpointError names what is wrong with it."""
    path = folder / FILE_NAME
    try:
        data = _read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {FILE_NAME} is missing, the checkpoint is torn") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}), the checkpoint is damaged") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}), the checkpoint is torn") from None
    if data.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not a manifest of '{FORMAT}'")
    version = data.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{path}: format version {version}, expected {VERSION}: use the dino-scale that wrote it")
    try:
        manifest = _decode(data)
        _require_consistent(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a field is missing or of the wrong form ({_said_by(error)})") from None
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(min(os.fstat(file.fileno()).st_size, _LONGEST) + 1)  # Python reserves all it may read
    if len(text) > _LONGEST:
        raise ValueError(f"more than {_LONGEST} bytes")
    return strict_json.parse(text)


def _said_by(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)


def _decode(data: dict[str, Any]) -> Manifest:
    counts = ("step", "optimizer_steps", "skipped_steps", "samples_seen", "world_size", "zero_stage", "random_rule")
    for name in counts:
        _count(data[name], name)
    data["kinds"] = tuple(_text(kind, "kinds") for kind in data["kinds"])
    data["parameters"] = {
        name: tuple(_count(size, name) for size in shape) for name, shape in data["parameters"].items()
    }
    data["pieces"] = {name: tuple(_piece(item, name) for item in items) for name, items in data["pieces"].items()}
    data["files"] = {_plain_name(name): _file_entry(item, name) for name, item in data["files"].items()}
    data["libraries"] = {name: _text(version, name) for name, version in data["libraries"].items()}
    data["best"] = None if data["best"] is None else _best(data["best"])
    data["groups"] = {name: _group(item, name) for name, item in data["groups"].items()}
    _text(data["index_digest"], "index_digest")
    if type(data["bf16_parameters"]) is not bool:
        raise ValueError(f"bf16_parameters is {data['bf16_parameters']!r}")
    if type(data["seed"]) is not int:
        raise ValueError(f"seed is {data['seed']!r}")
    return Manifest(**data)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} has {value!r}, expected a whole number from 0 on")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} has {value!r}, expected text")
    return value


def _piece(item: dict[str, Any], name: str) -> Piece:
    piece = Piece(**item)
    _text(piece.file, name)
    _count(piece.start, name)
    _count(piece.numel, name)
    return piece


def _best(item: dict[str, Any]) -> Best:
    best = Best(_text(item["metric"], "best"), float(item["value"]), _count(item["step"], "best"))
    if not math.isfinite(best.value):
        raise ValueError(f"best has the value {best.value}")
    return best


def _group(item: dict[str, Any], name: str) -> Group:
    group = Group(float(item["learning_rate"]), float(item["weight_decay"]), _count(item["tensors"], name))
    if not (math.isfinite(group.learning_rate) and math.isfinite(group.weight_decay)):
        raise ValueError(f"group {name} has {group}")
    return group


def _file_entry(item: dict[str, Any], name: str) -> FileEntry:
    entry = FileEntry(**item)
    _count(entry.bytes, name)
    if _DIGEST.fullmatch(_text(entry.sha256, name)) is None:
        raise ValueError(f"{name} has the sha256 {entry.sha256!r}")
    return entry


def _plain_name(name: str) -> str:
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name or "\0" in name:
        raise ValueError(f"file name {name!r} leaves the folder")
    return name


def _require_consistent(manifest: Manifest) -> None:
    """ValueError unless every element of every parameter lies in exactly one place, and files have room for them."""
    if COMMON not in manifest.files:
        raise ValueError(f"files lacks {COMMON}")
    if "fp32" not in manifest.kinds or len(set(manifest.kinds)) != len(manifest.kinds):
        raise ValueError(f"kinds has {list(manifest.kinds)}")
    if manifest.pieces.keys() - manifest.parameters.keys():
        raise ValueError(f"pieces of {sorted(manifest.pieces.keys() - manifest.parameters.keys())[0]}, no parameter")
    for name, shape in manifest.parameters.items():
        position = 0
        for piece in manifest.pieces.get(name, ()):
            if piece.start != position:
                raise ValueError(f"parameter {name} is not whole: its pieces overlap or leave a hole at {position}")
            position += piece.numel
        if position != math.prod(shape):
            raise ValueError(f"parameter {name} is not whole: pieces hold {position} of {math.prod(shape)} elements")
    for file, tensors in expected_tensors(manifest).items():
        needed = _ELEMENT_BYTES * sum(tensors.values())
        if file == COMMON or file not in manifest.files or manifest.files[file].bytes < needed:
            raise ValueError(f"pieces of {needed} bytes are said to lie in {file!r}, which has no room for them")


def expected_tensors(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Of every shard with pieces in it: key of each tensor and its number of elements."""
    found: dict[str, dict[str, int]] = {}
    for name, pieces in manifest.pieces.items():
        for piece in pieces:
            for kind in manifest.kinds:
                found.setdefault(piece.file, {})[tensor_key(kind, name, piece.start)] = piece.numel
    return found


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files all exist with the content written; else CheckpointError."""
    manifest = read_manifest(folder)
    require_sizes(folder, manifest)
    verify_files(folder, manifest, manifest.files)
    return manifest


def require_sizes(folder: Path, manifest: Manifest) -> None:
    """The part of `verify` that takes no time: CheckpointError unless every file is there with the size written."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, the checkpoint is torn")
        size = path.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{path}: {size} bytes, expected {entry.bytes}: truncated or altered")


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """The part of `verify` that reads the files, for those called `names`."""
    expected = expected_tensors(manifest)
    for name in names:
        path = folder / name
        try:
            found = digest_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}), the checkpoint is damaged") from None
        if found != manifest.files[name]:
            raise CheckpointError(f"{path}: sha256 differs from the manifest: altered after it was written")
        _require_tensors(path, expected.get(name, {}))


def _require_tensors(path: Path, expected: dict[str, int]) -> None:
    """CheckpointError unless a shard holds exactly the float32 vectors that the manifest lists."""
    if path.name == COMMON:
        read_header(path, _LONGEST_COMMON_HEADER)
        return
    longest = 1024 + sum(6 * len(key) + 160 for key in expected)
    found = read_header(path, longest)
    wanted = {key: TensorEntry("F32", (numel,)) for key, numel in expected.items()}
    if found != wanted:
        key = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise CheckpointError(f"{path}: tensor {key} is {found.get(key)}, the manifest says {wanted.get(key)}: altered")
