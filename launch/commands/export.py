"""`dino-scale export`: a weights file in a form that other programs read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dino_scale.checkpoint.official_convert import from_official, official_settings, to_official
from dino_scale.checkpoint.official_model import OfficialModel
from dino_scale.checkpoint.weights import Weights, load_weights, save_weights
from dino_scale.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if arguments.out.exists():
        raise UserError(f"--out is {arguments.out}, which exists: give the name of a new file")
    weights = load_weights(arguments.weights)
    if arguments.format == "safetensors":
        save_weights(arguments.out, weights)
        console.print(f"{len(weights.state)} tensors in {arguments.out}")
        return
    content = _official(weights)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    _save(arguments.out, content)
    console.print(f"{len(content['model'])} entries under official names in {arguments.out}")


def _official(weights: Weights) -> dict[str, Any]:
    """The content of an official checkpoint; plain values only, so that `weights_only` loading accepts it."""
    classes = len(weights.categories)
    official = to_official(weights.state, weights.model)
    from_official(official, OfficialModel(weights.model, classes))  # it must come back: nothing missing or left over
    return {"model": official, "args": official_settings(weights.model, classes)}


def _save(path: Path, content: dict[str, Any]) -> None:
    """Beside its final place, synced, then renamed: never half there."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
