"""Writes one shard: `KEY.jpg` + `KEY.json` in a tar file, and a receipt beside it that says what went in.

A shard whose receipt matches its task is not written again: an interrupted packing goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data_pipeline.checksum import crc32
from data_pipeline.decode import JPEG_QUALITY, decode, encode_jpeg
from data_pipeline.findings import Defect, Findings, Repair, Tally
from data_pipeline.manifest import FileEntry, describe_file
from dino_scale.errors import DataError

os.environ["WDS_SECURE"] = "1"  # read on import: no pipes, no URLs that run commands
import webdataset

Verify = Literal["decode", "header"]
RECEIPTS = "receipts"
ATTEMPT = ".partial-"  # between the name of a shard and that of an attempt to write it


@dataclass(frozen=True)
class Member:
    """One sample to be written. row: its place in the survey. content: its KEY.json. size, modified: of the file."""

    row: int
    key: str
    image_id: int
    path: str
    file_name: str
    plain_jpeg: bool
    size: int
    modified: int
    content: str


@dataclass(frozen=True)
class ShardTask:
    """folder: where to write; empty: only look at the images. skip_unreadable: leave them out, counted. collect:
    count defects (`examine_shard` only) instead of raising the first."""

    number: int
    folder: str
    members: tuple[Member, ...]
    verify: Verify
    skip_unreadable: bool
    collect: bool = False

    def digest(self) -> str:
        """Of everything that decides the shard's bytes; a file counts by its path, size and time."""
        facts = [self.verify, self.skip_unreadable, [asdict(member) for member in self.members]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Receipt:
    """A shard as written. rows: of the samples in it; offsets, sizes, checksums (CRC-32): of their images."""

    task: str  # digest of the task
    shard: FileEntry
    rows: list[int]
    offsets: list[int]
    sizes: list[int]
    checksums: list[int]
    repairs: list[Repair] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Receipt:
        content = json.loads(text)
        repairs = [Repair(**row) for row in content["repairs"]]
        return cls(**{**content, "shard": FileEntry(**content["shard"]), "repairs": repairs})


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def write_shard(task: ShardTask) -> Receipt:
    """The shard of a task, written now or found finished. Raises DataError naming a file that cannot be used."""
    folder = Path(task.folder)
    receipt_path = folder / RECEIPTS / f"{task.number:05d}.json"
    finished = _finished(folder, receipt_path, task.digest())
    if finished is not None:
        return finished
    name = shard_name(task.number)
    # Every attempt has a file of its own: on a cluster a machine that was given up may still be at work.
    partial = folder / f"{name}{ATTEMPT}{uuid.uuid4().hex[:12]}"
    repairs: list[Repair] = []
    rows, checksums = [], []
    with (
        open(partial, "wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
    ):
        for member, image in readable_images(task, Findings(repairs.append)):
            rows.append(member.row)
            checksums.append(crc32(image))
            writer.write({"__key__": member.key, "jpg": image, "json": member.content.encode()})
    with tarfile.open(partial, "r:") as shard:
        places = [(entry.offset_data, entry.size) for entry in shard if entry.name.endswith(".jpg")]
    os.replace(partial, folder / name)
    offsets, sizes = [offset for offset, _ in places], [size for _, size in places]
    receipt = Receipt(task.digest(), describe_file(folder, name), rows, offsets, sizes, checksums, repairs)
    receipt_partial = receipt_path.with_name(f"{partial.name}-receipt")
    receipt_partial.write_text(json.dumps(asdict(receipt)), encoding="utf-8")
    os.replace(receipt_partial, receipt_path)
    return receipt


def examine_shard(task: ShardTask) -> tuple[list[int], list[Repair], Tally]:
    """The rows that `write_shard` would write, what it would mend, and defects if collected; nothing is written."""
    repairs: list[Repair] = []
    findings = Findings(repairs.append, task.collect)
    return [member.row for member, _ in readable_images(task, findings)], repairs, findings.defects


def readable_images(task: ShardTask, findings: Findings) -> Iterator[tuple[Member, bytes]]:
    """The members with their JPEG bytes: the file's own where they are a plain JPEG, otherwise encoded anew."""
    for member in task.members:
        try:
            image, encoded = _image_bytes(member, task.verify)
        except DataError as error:
            if task.skip_unreadable:
                what = str(error)
                findings.mended(Repair("images_unreadable_skipped", member.file_name, "image", member.image_id, what))
            else:
                findings.refused(Defect(f"{member.path}: image {member.image_id} {error}", "images_unreadable"))
            continue
        if encoded:
            what = f"JPEG of quality {JPEG_QUALITY}"
            findings.mended(Repair("images_reencoded_as_jpeg", member.file_name, "image", member.image_id, what))
        yield member, image


def _image_bytes(member: Member, verify: Verify) -> tuple[bytes, bool]:
    """A JPEG, and whether it was encoded here. Raises DataError (message without the path)."""
    try:
        data = Path(member.path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}): check the file") from None
    if member.plain_jpeg and verify == "header":
        return data, False
    pixels = decode(data)
    return (data, False) if member.plain_jpeg else (encode_jpeg(pixels), True)


def _finished(folder: Path, receipt_path: Path, task: str) -> Receipt | None:
    """The receipt, where it is of this very task and the shard's bytes are those it names."""
    if not receipt_path.exists():
        return None
    try:
        receipt = Receipt.parse(receipt_path.read_text(encoding="utf-8"))
        entry = describe_file(folder, receipt.shard.name)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # torn by a crash of the machine: the shard is written anew
    return receipt if receipt.task == task and entry == receipt.shard else None
