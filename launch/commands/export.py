"""`dino-scale export`: a checkpoint as a weights file, or a weights file in a form that other programs read."""

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
from launch.checkpoint_choice import choose
from launch.commands.output import require_new_file


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    _require_one_source(arguments)
    require_new_file(arguments.out)
    if arguments.source is not None:
        _from_checkpoint(arguments, console)
        return
    weights = load_weights(arguments.weights)
    if arguments.format == "safetensors":
        save_weights(arguments.out, weights)
        console.print(f"{len(weights.state)} tensors in {arguments.out}")
        return
    content = _official(weights)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    _save(arguments.out, content)
    console.print(f"{len(content['model'])} entries under official names in {arguments.out}")


def _require_one_source(arguments: argparse.Namespace) -> None:
    if (arguments.source is None) == (arguments.weights is None):
        raise UserError("export: expected either a checkpoint or run folder, or --weights W")
    if arguments.weights is not None and arguments.format is None:
        raise UserError("export: --weights needs --format: expected --format official or --format safetensors")
    if arguments.source is not None and arguments.format == "official":
        raise UserError(
            f"export: --format {arguments.format} takes --weights W: write the weights file of {arguments.source} first"
        )
    for option, given in (
        ("--best", arguments.best),
        ("--stage", arguments.stage is not None),
        ("--no-ema", arguments.no_ema),
    ):
        if given and arguments.source is None:
            raise UserError(
                f"export: {option} is about checkpoints: expected a checkpoint or run folder, not --weights"
            )


def _from_checkpoint(arguments: argparse.Namespace, console: Console) -> None:
    chosen = choose(arguments.source, arguments.stage, best=arguments.best)
    console.print(f"{chosen.folder} ...")
    done = chosen.export(arguments.out, averaged=not arguments.no_ema)
    manifest, what = done.manifest, "averaged weights" if done.averaged else "weights as trained"
    best = manifest.best
    measured = f", {best.metric} {best.value:.3f}" if best is not None and best.step == manifest.step else ""
    place = f"stage {chosen.stage}, step {manifest.step:,}{measured}"
    console.print(f"{place}: {done.tensors} tensors, {what}, in {arguments.out}")


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
