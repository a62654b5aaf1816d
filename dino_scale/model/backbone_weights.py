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
_NAMED = 5  # tensors that a refusal lists
_WRAPPERS = ("model", "state_dict")  # keys under which training scripts store the weights


def load_backbone_weights(body: nn.Module, path: Path, architecture: str) -> None:
    """Fills a timm feature network; tensors of the file that it does not have (a classifier) are left out.

    Raises DataError where the file cannot be read, lacks a tensor or holds one of another shape.
    """
    weights = _read(path)
    state, misfits = {}, []
    for name, own in body.state_dict().items():
        found = weights.get(name, weights.get(name_in_timm(name)))
        if name.endswith(_COUNTER):
            state[name] = own
        elif found is None or found.shape != own.shape:
            got = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            misfits.append(f"'{name_in_timm(name)}' {got}, expected shape {tuple(own.shape)}")
        else:
            state[name] = found
    if misfits:
        more = f"; {len(misfits) - _NAMED} more tensors do not fit" if len(misfits) > _NAMED else ""
        raise DataError(
            f"model.backbone.weights {path}: {'; '.join(misfits[:_NAMED])}{more}; give timm weights of {architecture}"
        )
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
            f"model.backbone.weights {path} cannot be read: {_first_line(error)}; expected .safetensors, or .pth with "
            "tensors only"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise DataError(
            f"model.backbone.weights {path}: holds a {type(content).__name__}, expected a dictionary of tensors by name"
        )
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
