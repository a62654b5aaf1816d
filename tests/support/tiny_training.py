"""A small module with everything that makes partitioned state hard: odd sizes, groups, frozen parts, shared layers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_scale.checkpoint import store
from dino_scale.config.schema import OptimizerConfig
from dino_scale.precision import BF16_PARAMETERS, autocast
from dino_scale.training import distributed
from dino_scale.training.ema import WeightAverage
from dino_scale.training.optimizer import ParameterGroup, parameter_groups
from dino_scale.training.zero import ZeroEngine

GLOBAL_BATCH = 12


class TinyModel(nn.Module):
    """A layer and the head are used twice, one layer is frozen, one buffer is persistent; sizes are odd on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, 11))
        self.backbone[0].requires_grad_(False)
        self.shared = nn.Linear(11, 11)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(11)
        self.head = nn.Linear(11, 3)
        self.register_buffer("offset", torch.full((5,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.shared(self.backbone(x)))
        second = torch.tanh(self.shared(first))
        return self.head(first) + self.head(self.norm(second) * self.scale) + self.offset.sum()


class TinyObjective(nn.Module):
    def __init__(self, model: TinyModel, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(x.device, self.precision):
            found = self.model(x)
        loss = (found.float() - y).pow(2).sum() / GLOBAL_BATCH
        return loss, {"total": loss.detach()}


def tiny_groups(model: TinyModel, config: OptimizerConfig) -> list[ParameterGroup]:
    """Backbone, detector, and a group of a single element: most ranks hold nothing but padding of it."""
    groups = []
    for group in parameter_groups(model, config):
        rest = tuple(item for item in group.parameters if item[0] != "scale")
        groups.append(replace(group, parameters=rest))
    groups.append(ParameterGroup("scale", 0.02, 0.0, (("scale", model.scale),)))
    return groups


def build(
    stage: int, microbatch: int = 2, decay: float = 0.9, precision: str = "fp32"
) -> tuple[ZeroEngine, WeightAverage]:
    torch.manual_seed(5)
    model = TinyModel()
    config = OptimizerConfig(learning_rate=0.03, backbone_learning_rate=0.01, weight_decay=0.05, clip_norm=0.5)
    accumulation = GLOBAL_BATCH // microbatch // distributed.world_size()
    engine = ZeroEngine(
        TinyObjective(model, precision),
        model,
        tiny_groups(model, config),
        stage=stage,
        microbatch=microbatch,
        accumulation=accumulation,
        clip_norm=config.clip_norm,
        betas=config.betas,
        epsilon=config.epsilon,
        bf16_parameters=precision == BF16_PARAMETERS,
    )
    return engine, WeightAverage(engine, decay)


def train(engine: ZeroEngine, average: WeightAverage, steps: range, microbatch: int = 2, bad: int = -1) -> list[float]:
    """Global losses per step; the data of a step depends on its number alone. `bad`: a step whose data is NaN."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(GLOBAL_BATCH, 7, generator=generator), torch.randn(GLOBAL_BATCH, 3, generator=generator)
        if step == bad:
            x[0, 0] = torch.nan
        world, rank = distributed.world_size(), distributed.rank()
        parts = GLOBAL_BATCH // microbatch // world
        total, outcome = torch.zeros(()), None
        engine.set_rate_factor(0.5 if step > 5 else 1.0)
        for number in range(rank * parts, (rank + 1) * parts):
            rows = slice(number * microbatch, (number + 1) * microbatch)
            loss, _ = engine(x[rows], y[rows])
            engine.backward(loss * parts * world)
            outcome = engine.step()
            total += loss.detach()
        if outcome.applied:
            average.update()
        losses.append(float(distributed.sum_over_ranks(total)))
    return losses


def digests(engine: ZeroEngine) -> dict[str, str]:
    """sha256 of the full tensors of every kind and of what is not trained."""
    tensors = {f"{kind}:{name}": value for kind in engine.kinds for name, value in engine.gather(kind).items()}
    tensors |= engine.untrained()
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def position(step: int) -> store.Position:
    return store.Position(step, 0, step * GLOBAL_BATCH, seed=0, index_digest="none")


def train_whole(stage: int, steps: int, bad: int = -1) -> tuple[list[float], dict[str, str], int]:
    engine, average = build(stage)
    losses = train(engine, average, range(steps), bad=bad)
    return losses, digests(engine), engine.optimizer_steps()


def train_and_save(stage: int, steps: int, root: str) -> tuple[list[float], dict[str, str]]:
    engine, average = build(stage)
    losses = train(engine, average, range(steps))
    store.save(Path(root), engine, position(steps), keep_last=2)
    return losses, digests(engine)


def load_and_train(stage: int, root: str, steps: int) -> tuple[dict[str, str], list[float], dict[str, str], list[str]]:
    """State right after loading, losses of the steps after it, final state, and what was said."""
    said: list[str] = []
    engine, average = build(stage)
    newest = distributed.on_rank_zero(lambda: store.find_newest(Path(root), said.append))
    assert newest is not None
    folder, manifest = newest
    with torch.no_grad():  # what is loaded must come from the file, not from equal initialisation
        engine.set_untrained({name: torch.full_like(value, 9.0) for name, value in engine.untrained().items()})
        for fragment in engine.fragments:
            for tensor in fragment.tensors.values():
                tensor.fill_(9.0)
    store.load(folder, manifest, engine)
    loaded = digests(engine)
    losses = train(engine, average, range(manifest.step, manifest.step + steps))
    return loaded, losses, digests(engine), said


def module_equals_masters(stage: int, root: str) -> dict[str, Any]:
    """Forward output of the engine after a load, and of a plain module with the gathered weights."""
    engine, _ = build(stage)
    newest = distributed.on_rank_zero(lambda: store.find_newest(Path(root), print))
    assert newest is not None
    store.load(*newest, engine)
    x = torch.linspace(-1, 1, 14).view(2, 7)
    with torch.no_grad():
        loss, _ = engine(x, torch.zeros(2, 3))
    plain = TinyModel()
    plain.load_state_dict(engine.gather("fp32") | engine.untrained())
    return {"engine": float(loss), "plain": float(TinyObjective(plain)(x, torch.zeros(2, 3))[0])}
