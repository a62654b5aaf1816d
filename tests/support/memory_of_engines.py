"""Real DeepSpeed engines around the small detector, whose tensors and messages are counted."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_scale.config.schema import DenoisingConfig, LossConfig, OptimizerConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import build_model
from dino_scale.structures import Batch
from dino_scale.training.ema import WeightAverage
from dino_scale.training.objective import Objective
from dino_scale.training.optimizer import parameter_groups
from dino_scale.training.zero import REDUCE_BUCKET, ZeroEngine
from tests.support.tiny_detector import CLASSES, TINY_BACKBONE, targets, tiny

# Some parameters above and some below the size that stage 3 keeps whole; some frozen.
MODEL = tiny(
    backbone=replace(TINY_BACKBONE, frozen_stages=1),
    hidden=64,
    feedforward=2048,
    decoder_layers=3,
    denoising=DenoisingConfig(queries=4),
)
OPTIMIZER = OptimizerConfig(backbone_layer_decay=0.9)  # many groups, each with a padding of its own


def engine_of(stage: int, accumulation: int) -> ZeroEngine:
    torch.manual_seed(0)
    model = build_model(MODEL, CLASSES).train()
    mean_std = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return ZeroEngine(
        Objective(model, Criterion(LossConfig()), precision="fp32", mean=mean_std[0], std=mean_std[1]),
        model,
        parameter_groups(model, OPTIMIZER),
        stage=stage,
        microbatch=2,
        accumulation=accumulation,
        clip_norm=0.1,
        betas=(0.9, 0.999),
        epsilon=1e-8,
    )


def batch(seed: int = 0, images: int = 2, size: tuple[int, int] = (64, 96), boxes: int = 3) -> Batch:
    pixels = torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    sizes, ids = (size,) * images, tuple(range(images))
    return Batch(pixels, sizes, sizes, ids, ids, targets(*(boxes,) * images, seed=seed))


Piece = tuple[int, int, int]  # number of the parameter, first element, elements


def every_stage(accumulation: int) -> list[tuple[int, dict[str, int], list[Piece]]]:
    """Of stages 0 to 3: bytes kept from step to step (with a weight average), bytes of messages in a step, and what
    this rank would write to a checkpoint."""
    return [(state_bytes(stage), *messages_and_pieces(stage, accumulation)) for stage in range(4)]


def state_bytes(stage: int) -> int:
    """What an engine keeps after a step, by looking at every tensor of the process."""
    before = _alive()
    engine = engine_of(stage, accumulation=1)
    average = WeightAverage(engine, 0.9)
    take_step(engine, 1)
    average.update()
    total = _alive() - before
    engine.destroy()
    return total


def messages_and_pieces(stage: int, accumulation: int) -> tuple[dict[str, int], list[Piece]]:
    """Bytes of the whole tensors that each kind of collective worked on in the second step."""
    engine = engine_of(stage, accumulation)
    take_step(engine, accumulation)
    messages = _Messages()
    with messages:
        take_step(engine, accumulation)
    order = {name: number for number, (name, _) in enumerate(p for group in engine.groups for p in group.parameters)}
    pieces = [(order[one.name], one.start + one.owned[0], one.owned[1]) for one in engine.fragments if one.owned[1]]
    engine.destroy()
    return dict(messages.sizes), sorted(pieces)


def take_step(engine: ZeroEngine, accumulation: int) -> None:
    for number in range(accumulation):
        loss, _ = engine(batch(number), 6.0, torch.Generator().manual_seed(number))
        engine.backward(loss)
        engine.step()


class _Messages(TorchDispatchMode):
    """Sees every collective of torch.distributed on its way to the process group."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operator.namespace == "c10d":
            name = str(operator).split(".")[1]
            self.sizes[name] += max((leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), default=0)
        return operator(*args, **(kwargs or {}))


def _alive() -> int:
    """Bytes of all storages of the process, except the bucket that stage 3 keeps: a CPU touches of it only what is
    filled, and the plan counts it apart."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.device.type == "cpu"]
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(size for size in sizes.values() if size != 4 * REDUCE_BUCKET)
