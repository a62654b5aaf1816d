"""Sharded checkpoints of a training engine: written by all ranks, read by any number of ranks under any ZeRO stage.

Layout of R/STAGE/checkpoints/step_00001234/:
    shard-00000.safetensors ...  what each writing rank owned: float32 pieces of weights, moments and average
    common.safetensors           frozen parameters and buffers, which are equal on all ranks
    manifest.json                table of contents with digests
A checkpoint is written into a hidden sibling folder, synced, and committed by one rename, so a folder named step_* is
either whole or was damaged later; `find_newest` tells the two apart by digest. Nothing here reads a pickle.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dino_scale.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, Piece, digest_file, tensor_key, verify
from dino_scale.checkpoint.ranges import ParameterReader
from dino_scale.checkpoint.verification import verify_together
from dino_scale.errors import CheckpointError
from dino_scale.training import distributed
from dino_scale.training.zero import Fragment, ZeroEngine

COMMON = "common.safetensors"
_PREFIX = "step_"


@dataclass(frozen=True)
class Position:
    """Where a run stands, apart from its tensors; fields as in Manifest."""

    step: int
    skipped_steps: int
    samples_seen: int
    seed: int
    index_digest: str


def save(root: Path, engine: ZeroEngine, position: Position, keep_last: int) -> Path:
    """Write the engine's state as `root`/step_XXXXXXXX; call on every rank. Only the newest `keep_last` are kept."""
    final = root / f"{_PREFIX}{position.step:08d}"
    partial = root / f".{final.name}.partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    files, pieces = _write_own_files(partial, engine)
    gathered = distributed.gather_objects((files, pieces))
    if distributed.rank() == 0:
        manifest = _manifest(engine, position, gathered)
        _write_synced(partial / FILE_NAME, manifest.to_json())
        _commit(partial, final)
        _delete_old(root, keep_last)
    distributed.barrier()
    return final


def _write_own_files(folder: Path, engine: ZeroEngine) -> tuple[dict[str, FileEntry], list[tuple[str, Piece]]]:
    name = f"shard-{distributed.rank():05d}.safetensors"
    tensors, pieces = {}, []
    for fragment in engine.fragments:
        offset, numel = fragment.owned
        if numel == 0:
            continue
        start = fragment.start + offset
        for kind, values in fragment.tensors.items():
            tensors[tensor_key(kind, fragment.name, start)] = values.narrow(0, offset, numel).cpu().contiguous()
        pieces.append((fragment.name, Piece(name, start, numel)))
    contents = {name: tensors}
    untrained = engine.untrained()
    if distributed.rank() == 0:
        contents[COMMON] = untrained
    entries = {}
    for file, content in contents.items():
        save_file(content, folder / file)
        _sync(folder / file)
        entries[file] = digest_file(folder / file)
    return entries, pieces


def _manifest(
    engine: ZeroEngine,
    position: Position,
    gathered: list[tuple[dict[str, FileEntry], list[tuple[str, Piece]]]],
) -> Manifest:
    files: dict[str, FileEntry] = {}
    pieces: dict[str, list[Piece]] = {}
    for own_files, own_pieces in gathered:
        files |= own_files
        for name, piece in own_pieces:
            pieces.setdefault(name, []).append(piece)
    return Manifest(
        **asdict(position),
        optimizer_steps=engine.optimizer_steps(),
        world_size=distributed.world_size(),
        zero_stage=engine.stage,
        kinds=engine.kinds,
        parameters=engine.shapes(),
        pieces={name: tuple(sorted(items, key=lambda piece: piece.start)) for name, items in pieces.items()},
        files=files,
        libraries={name: metadata.version(name) for name in ("torch", "deepspeed", "safetensors")},
    )


def _commit(partial: Path, final: Path) -> None:
    _sync(partial)
    if final.exists():  # the same step written again, by a run that was resumed and interrupted at once
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(final.parent)


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_old(root: Path, keep_last: int) -> None:
    for folder in list_checkpoints(root)[:-keep_last]:
        shutil.rmtree(folder)


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first; not verified."""
    if not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and folder.name.startswith(_PREFIX))


def find_newest(root: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint in `root` with its manifest, None when there is none at all.

    A damaged one is skipped, with a message to `say` that names it and the one used instead. CheckpointError when every
    checkpoint is damaged: starting anew would throw work away without asking.
    """
    return _newest(root, list_checkpoints(root), verify, say)


def find_newest_together(root: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """`find_newest` on every rank at once, with the same result or error on all; each reads a share of the files."""
    return _newest(root, distributed.on_rank_zero(lambda: list_checkpoints(root)), verify_together, say)


def _newest(
    root: Path, folders: Sequence[Path], check: Callable[[Path], Manifest], say: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    problems: list[CheckpointError] = []
    for folder in reversed(folders):
        try:
            manifest = check(folder)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            say(f"{problem}; using {folder.name} instead")
        return folder, manifest
    if problems:
        raise CheckpointError(f"{problems[0]}; no whole checkpoint is left in {root}: delete that folder to start anew")
    return None


def load(folder: Path, manifest: Manifest, engine: ZeroEngine) -> None:
    """Put a checkpoint into the engine, whatever world size and stage wrote it; each rank reads only its own ranges.

    The caller has verified the folder (`find_newest`). CheckpointError when names, shapes or kinds differ.
    """
    _require_same_parameters(folder, manifest, engine)
    with ParameterReader(folder, manifest) as reader:
        for fragment in engine.fragments:
            _fill(fragment, reader)
    _load_untrained(folder / COMMON, engine)
    engine.set_optimizer_steps(manifest.optimizer_steps)
    engine.publish()


def _require_same_parameters(folder: Path, manifest: Manifest, engine: ZeroEngine) -> None:
    expected = engine.shapes()
    differing = sorted(
        name
        for name in expected.keys() | manifest.parameters.keys()
        if expected.get(name) != manifest.parameters.get(name)
    )
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{folder}: parameter {name} has shape {manifest.parameters.get(name)}, the model {expected.get(name)} "
            f"({len(differing)} parameters differ): resume with the configuration that wrote it"
        )
    missing = set(engine.kinds) - set(manifest.kinds)
    if missing:
        raise CheckpointError(
            f"{folder}: holds {', '.join(manifest.kinds)} but not {', '.join(sorted(missing))}: "
            "resume with the ema_decay that wrote it"
        )


def _fill(fragment: Fragment, reader: ParameterReader) -> None:
    """Read straight into the engine's memory, or into a buffer of one fragment where that is on a device."""
    for kind, values in fragment.tensors.items():
        host = values if values.device.type == "cpu" else torch.empty(fragment.numel)
        reader.read_into(kind, fragment.name, fragment.start, host.numpy().data.cast("B"))
        if host is not values:
            values.copy_(host)


def _load_untrained(path: Path, engine: ZeroEngine) -> None:
    saved = load_file(path)
    present = engine.untrained().keys()
    if saved.keys() != present:
        raise CheckpointError(f"{path}: {sorted(saved.keys() ^ present)[0]} is on one side only")
    engine.set_untrained(saved)
