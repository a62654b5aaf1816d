"""A checkpoint written by hand, in a format that is spelled out here once more: nothing of it needs a training run."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np

from dino_scale.checkpoint.manifest import Group, Manifest, Piece, tensor_key
from dino_scale.checkpoint.ranges import ShardWriter, vector

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
SHAPES = {"head.weight": (3, 7), "gain": (1,), "body.weight": (13, 11), "body.bias": (13,)}


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]] = SHAPES, shards: int = 3) -> Manifest:
    """Random bytes as values (NaN and -0.0 among them), cut at random places and dealt to the shards."""
    folder.mkdir(parents=True)
    dice = random.Random(0)
    dealt: dict[str, list[tuple[str, int, int]]] = {f"shard-{number:05d}.safetensors": [] for number in range(shards)}
    for name, shape in shapes.items():
        numel = math.prod(shape)
        cuts = sorted({0, numel, *(dice.randrange(numel) for _ in range(shards - 1))})
        for start, end in pairwise(cuts):
            dealt[dice.choice(list(dealt))].append((name, start, end - start))
    pieces: dict[str, list[Piece]] = {}
    files = {}
    for file, held in dealt.items():
        files[file] = _write_shard(folder / file, held, dice)
        for name, start, numel in held:
            pieces.setdefault(name, []).append(Piece(file, start, numel))
    common = ShardWriter(folder / "common.safetensors", {"offset": vector(5)})
    common.write(bytes(range(20)))
    files["common.safetensors"] = common.close()
    ordered = {name: tuple(sorted(held, key=lambda piece: piece.start)) for name, held in pieces.items()}
    manifest = Manifest(
        step=4,
        optimizer_steps=3,
        skipped_steps=1,
        samples_seen=48,
        seed=0,
        world_size=shards,
        zero_stage=2,
        index_digest="none",
        kinds=KINDS,
        parameters=dict(shapes),
        pieces=ordered,
        files=files,
        libraries={"torch": "2"},
        groups={"body": Group(1e-4, 0.05, 2), "rest": Group(2e-5, 0.0, 2)},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def _write_shard(path: Path, held: list[tuple[str, int, int]], dice: random.Random):
    contents = {tensor_key(kind, name, start): vector(numel) for kind in KINDS for name, start, numel in held}
    writer = ShardWriter(path, contents)
    for entry in contents.values():
        writer.write(dice.randbytes(entry.bytes))
    return writer.close()


def whole_parameters(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The bytes of every kind of every parameter, read with the safetensors library alone."""
    from safetensors.numpy import load_file

    files = {name: load_file(folder / name) for name in manifest.files if name.startswith("shard-")}
    whole = {}
    for kind in manifest.kinds:
        for name, shape in manifest.parameters.items():
            full = np.zeros(math.prod(shape), np.float32)
            for piece in manifest.pieces[name]:
                full[piece.start : piece.start + piece.numel] = files[piece.file][tensor_key(kind, name, piece.start)]
            whole[f"{kind}:{name}"] = full.tobytes()
    return whole
