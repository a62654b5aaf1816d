"""Checkpoints without an engine: made-up tensors of one or more ranks, written and committed by the real threads."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import torch
from safetensors import safe_open

from dino_scale.checkpoint import layout
from dino_scale.checkpoint.background import BackgroundWrite, Shipment
from dino_scale.checkpoint.manifest import COMMON, Manifest, Piece, tensor_key, verify

KINDS = ("fp32", "exp_avg")
SHAPES = {"layer.weight": (6, 5), "layer.bias": (7,)}


def manifest(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Manifest:
    return Manifest(step, step, 0, 4 * step, 0, 1, 1, "none", KINDS, shapes, {}, {}, {"torch": torch.__version__})


def shipments(
    root: Path,
    step: int,
    world: int = 1,
    keep_last: int | None = 3,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> list[Shipment]:
    """One per rank; every element of the checkpoint equals `step`."""
    token = uuid.uuid4().hex
    made = []
    for rank in range(world):
        file = f"shard-{rank:05d}.safetensors"
        tensors, pieces = {}, []
        for name, shape in shapes.items():
            share = torch.arange(torch.Size(shape).numel()).tensor_split(world)[rank]
            pieces.append((name, Piece(file, int(share[0]), len(share))))
            for kind in KINDS:
                tensors[tensor_key(kind, name, int(share[0]))] = torch.full((len(share),), float(step))
        contents = {file: tensors} | ({COMMON: {"offset": torch.tensor(float(step))}} if rank == 0 else {})
        name = layout.checkpoint_name(step, best=keep_last is None)
        content = manifest(step, shapes)
        made.append(Shipment(root, name, token, rank, world, contents, tuple(pieces), content, keep_last))
    return made


def write(root: Path, step: int, world: int = 1, keep_last: int | None = 3) -> Path:
    """A committed checkpoint."""
    writes = [BackgroundWrite(shipment) for shipment in shipments(root, step, world, keep_last)]
    for one in writes:
        one.join()
        assert one.error is None, one.error
    return root / writes[0].shipment.name


def values(folder: Path) -> set[float]:
    """All different numbers in a checkpoint, which is verified first."""
    found = set()
    for name in verify(folder).files:
        with safe_open(folder / name, framework="pt") as file:
            found |= {value for key in file.keys() for value in file.get_tensor(key).view(-1).tolist()}  # noqa: SIM118
    return found


if __name__ == "__main__":  # writes checkpoint after checkpoint until it is killed
    shapes = {"large": (3_000_000,)}
    for step in range(int(sys.argv[2]), 10**6):
        own = BackgroundWrite(shipments(Path(sys.argv[1]), step, keep_last=2, shapes=shapes)[0])
        own.join()
        print(own.error or step, flush=True)
