"""Backbone weights from a local file with timm's names."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_scale.errors import DataError

_COUNTER = "num_batches_tracked"  # of a BatchNorm; not a weight
_WRAPPERS = ("model", "state_dict")  # keys under which training scripts store the weights


def load_backbone_weights(body: nn.Module, path: Path, architecture: str) -> None:
    """Fills a timm feature network; tensors of the file that it does not have (a classifier) are left out.

    Raises DataError where the file cannot be read, lacks a tensor or holds one of another shape.
    """
    weights = _read(path)
    state = {}
    for name, own in body.state_dict().items():
        found = weights.get(name, weights.get(name_in_timm(name)))
        if name.endswith(_COUNTER):
            state[name] = own
        elif found is None or found.shape != own.shape:
            got = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise DataError(
                f"model.backbone.weights {path}: '{name_in_timm(name)}' {got}, expected shape {tuple(own.shape)}; "
                f"give timm weights of {architecture}"
            )
        else:
            state[name] = found
    body.load_state_dict(state)


def name_in_timm(name: str) -> str:
    """timm's feature networks join the first two parts of some names: layers_0.x is layers.0.x in a file."""
    return re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", name)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"model.backbone.weights is '{path}': expected a file with timm weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(
            f"model.backbone.weights {path} cannot be read: {error}; expected .safetensors, or .pth with tensors only"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            return content[wrapper]
    return content
