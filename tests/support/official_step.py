"""Training steps on a golden case: outputs, losses and gradients under official names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino_scale.checkpoint.official import official_names
from dino_scale.config.schema import LossConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.denoising import Draws
from dino_scale.model.dino import Dino
from dino_scale.model.outputs import Outputs
from tests.support.goldens import Case, official_gradients

PARTS = {"loss_ce": "class", "loss_bbox": "box", "loss_giou": "giou"}


@dataclass(frozen=True)
class Step:
    """outputs and losses of a training step, and every gradient under its official name."""

    outputs: Outputs
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def norm(self, name: str) -> float:
        return float(self.gradients[name].double().norm())


@dataclass(frozen=True)
class Trajectory:
    """steps: loss and gradient norm before clipping of each. sums: of each parameter afterwards, by official name."""

    steps: list[tuple[float, float]]
    sums: dict[str, float]


def train_step(case: Case, model: Dino, draws: Draws | None) -> Step:
    """draws: None switches denoising off."""
    denoiser = model.denoiser
    model.denoiser = denoiser if draws is not None else None
    model.train()
    model.zero_grad(set_to_none=True)
    outputs = model(case.images, case.padding, case.targets, draws=draws)
    losses = Criterion(LossConfig())(outputs, case.targets, box_count=float(sum(case.targets.counts)))
    losses["total"].backward()
    step = Step(outputs, {name: value.detach() for name, value in losses.items()}, official_gradients(model))
    model.denoiser = denoiser
    return step


def train_five_steps(case: Case) -> Trajectory:
    """Official groups, AdamW and clipping; the noise of step s is drawn under seed 5000 + s."""
    model = case.model().train()
    groups = [_group_of(model, backbone=False, rate=1e-4), _group_of(model, backbone=True, rate=1e-5)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    steps = []
    for step in range(5):
        outputs = model(case.images, case.padding, case.targets, torch.Generator().manual_seed(5000 + step))
        loss = Criterion(LossConfig())(outputs, case.targets, box_count=float(sum(case.targets.counts)))["total"]
        optimizer.zero_grad()
        loss.backward()
        before_clipping = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        steps.append((float(loss.detach()), float(before_clipping)))
    sums = {
        official_names(name, model.config.decoder_layers)[0]: float(parameter.detach().double().sum())
        for name, parameter in model.named_parameters()
    }
    return Trajectory(steps, sums)


def official_loss_name(name: str, layers: int) -> str:
    """Our "denoising0/box" is the official "loss_bbox_dn_0"; the last of the layers carries no number there."""
    source, part = name.split("/")
    official = next(key for key, value in PARTS.items() if value == part)
    if source == "encoder":
        return f"{official}_interm"
    kind, layer = ("_dn", source.removeprefix("denoising")) if "denoising" in source else ("", source[len("decoder") :])
    return official + kind + ("" if int(layer) + 1 == layers else f"_{layer}")


def _group_of(model: Dino, backbone: bool, rate: float) -> dict[str, Any]:
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.startswith("backbone.") == backbone
    ]
    return {"params": parameters, "lr": rate}
