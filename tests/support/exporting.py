"""A weights file from a checkpoint, beside the engine that wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dino_scale.checkpoint import bench, store
from dino_scale.checkpoint.export import export_weights
from dino_scale.checkpoint.weights import Preparation, Weights, save_weights
from dino_scale.model.dino import Dino
from dino_scale.structures import Category
from dino_scale.training import distributed
from dino_scale.training.ema import WeightAverage
from tests.support.detector_training import DECAY, build
from tests.support.tiny_detector import CLASSES, TINY_BACKBONE
from tests.support.tiny_training import position

CATEGORIES = tuple(Category(3 * number, f"class {number}") for number in range(CLASSES))
PREPARATION = Preparation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 64, 96)


def save_and_export(stage: int, precision: str, feedforward: int, root: str) -> dict[str, Any]:
    """Every kind of weights of a checkpoint, exported and as a stage writes them: whether the bytes are equal, and the
    memory that exporting took, by kind; and the bytes of one kind."""
    backbone = replace(TINY_BACKBONE, norm="frozen_batch", frozen_stages=1)  # frozen parameters and buffers
    engine, _ = build(stage, precision, feedforward=feedforward, backbone=backbone)
    WeightAverage(engine, DECAY)
    for fragment in engine.fragments:
        fragment.tensors["ema"].mul_(0.5)
    folder = store.save(Path(root, "checkpoints"), engine, position(7), keep_last=1)
    found: dict[str, Any] = {}
    for kind in ("ema", "fp32"):
        state = engine.gather(kind) | engine.untrained()
        found[kind] = distributed.on_rank_zero(
            lambda kind=kind, state=state: _export(folder, kind, state, engine.model)
        )
    return found | {"bytes": 4 * sum(torch.Size(shape).numel() for shape in engine.shapes().values())}


def _export(folder: Path, kind: str, state: dict[str, torch.Tensor], model: Dino) -> tuple[bool, int]:
    exported, written = folder.parent / f"{kind}.safetensors", folder.parent / f"{kind}-whole.safetensors"
    save_weights(written, Weights(state, model.config, CATEGORIES, PREPARATION))
    before = bench._resident()
    bench._forget_peak()
    done = export_weights(folder, exported, model.config, CATEGORIES, PREPARATION, averaged=kind == "ema")
    grown = bench._status("VmHWM") - before
    assert done.averaged == (kind == "ema") and done.tensors == len(state)
    return exported.read_bytes() == written.read_bytes(), grown
