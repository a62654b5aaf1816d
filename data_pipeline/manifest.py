"""The manifest of a packed dataset: which files belong to it, their sizes and digests, and the classes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino_scale.errors import DataError
from dino_scale.structures import Category

VERSION = 2
MANIFEST = "manifest.json"
REPORT = "report.json"
REPAIRS = "repairs.jsonl"
REMEDY = "make the folder anew with `dino-scale pack`"
_SHARD_NAME = re.compile(r"shard-\d{5,}\.tar")
_REPORT_NAME = re.compile(rf"{re.escape(REPORT)}|{re.escape(REPAIRS)}")
_COLUMN_NAME = re.compile(r"index/[a-z0-9_]+\.npy")


@dataclass(frozen=True)
class FileEntry:
    """A file of the dataset. name: path inside the folder. sha256: hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a packed folder holds. source: format, seed and such; reports: files about what was mended; both for people,
    so that a folder opens without the latter."""

    samples: int
    boxes: int
    categories: tuple[Category, ...]
    shards: tuple[FileEntry, ...]
    columns: tuple[FileEntry, ...]
    source: Mapping[str, str | int]
    reports: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """Names the content of the whole dataset: equal digests, equal shards, index and classes."""
        content = json.dumps([asdict(self), VERSION], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        content = {"format": "dino-scale shards", "version": VERSION, "digest": self.digest, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def describe_file(folder: Path, name: str) -> FileEntry:
    with open(folder / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(name, (folder / name).stat().st_size, digest)


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError where the manifest is missing, of another version, malformed or altered."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): expected a folder made by `dino-scale pack`"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not valid JSON: {REMEDY}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise DataError(f"{path}: is not a manifest of version {VERSION}: {REMEDY}")
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is malformed ({type(error).__name__}: {error}): {REMEDY}") from None
    if manifest.digest != content.get("digest"):
        raise DataError(f"{path}: its digest is {content.get('digest')}, its content gives {manifest.digest}: {REMEDY}")
    return manifest


def _parse(content: Mapping[str, Any]) -> Manifest:
    return Manifest(
        samples=int(content["samples"]),
        boxes=int(content["boxes"]),
        categories=tuple(Category(int(row["id"]), str(row["name"])) for row in content["categories"]),
        shards=tuple(_entry(row, _SHARD_NAME) for row in content["shards"]),
        columns=tuple(_entry(row, _COLUMN_NAME) for row in content["columns"]),
        source=dict(content["source"]),
        reports=tuple(_entry(row, _REPORT_NAME) for row in content["reports"]),
    )


def _entry(row: Mapping[str, Any], allowed: re.Pattern[str]) -> FileEntry:
    """A file entry; its name must be one that packing makes, so that no manifest leads out of its folder."""
    if not allowed.fullmatch(str(row["name"])):
        raise ValueError(f"file name {row['name']!r} is not one that packing makes")
    return FileEntry(str(row["name"]), int(row["size"]), str(row["sha256"]))
