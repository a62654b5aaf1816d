"""Whole tensors from a sharded checkpoint, without an engine: for looking at a moment of training afterwards."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dino_scale.checkpoint.manifest import COMMON, Piece, tensor_key, verify
from dino_scale.errors import CheckpointError


def read_whole(folder: Path, kind: str = "fp32") -> dict[str, Tensor]:
    """The state dict of the model as saved in `folder`; trained parameters of `kind` ("fp32" or "ema").

    Raises CheckpointError where the checkpoint is damaged, incomplete, or was written without that kind.
    """
    manifest = verify(folder)
    if kind not in manifest.kinds:
        raise CheckpointError(f"{folder}: holds {', '.join(manifest.kinds)}, expected {kind} among them")
    state = load_file(folder / COMMON)
    for name, shape in manifest.parameters.items():
        pieces = [_read(folder, kind, name, piece) for piece in manifest.pieces[name]]
        state[name] = torch.cat(pieces).view(shape)
    return state


def _read(folder: Path, kind: str, name: str, piece: Piece) -> Tensor:
    with safe_open(folder / piece.file, framework="pt") as file:
        return file.get_tensor(tensor_key(kind, name, piece.start))
