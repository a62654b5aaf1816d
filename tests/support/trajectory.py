"""A training run with everything random and everything sharded in it, small enough to be repeated dozens of times.

Drop path and dropout, augmentation with crops, contrastive denoising, a weight average, clipping that acts in every
step, images with many boxes and with none, an epoch that does not end with a batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.index import Index
from data_pipeline.pack import pack
from data_pipeline.synthetic import write_synthetic
from dino_scale.checkpoint.layout import list_checkpoints
from dino_scale.checkpoint.whole import read_whole
from dino_scale.config.schema import (
    AugmentationConfig,
    BackboneConfig,
    BatchConfig,
    ChainConfig,
    CheckpointConfig,
    DataConfig,
    DenoisingConfig,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
)
from dino_scale.training.control import Event
from dino_scale.training.sample_log import read_samples
from launch.worker import StageJob, run_stage
from tests.support.processes import run_ranks
from tests.support.sample_ids import expected_images

STAGE = "only"
SEED, IMAGES, GLOBAL_BATCH = 11, 27, 8
MODEL = ModelConfig(
    backbone=BackboneConfig(
        name="resnet10t",
        arguments={"channels": [8, 16, 24, 32], "stem_width": 8},
        norm="frozen_batch",
        frozen_stages=0,
        drop_path=0.2,
    ),
    hidden=32,
    heads=4,
    levels=4,
    feedforward=48,
    encoder_layers=1,
    decoder_layers=2,
    queries=20,
    dropout=0.05,
    denoising=DenoisingConfig(queries=6),
)
# Transformers as backbones, randomly initialised.
_AS_TIMM_HAS_IT: dict[str, Any] = {"outputs": (1, 2, 3), "norm": "native", "frozen_stages": 0, "drop_path": 0.2}
SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    arguments={"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]},
    **_AS_TIMM_HAS_IT,
)
CONVNEXT = BackboneConfig(
    name="convnext_atto", arguments={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, **_AS_TIMM_HAS_IT
)
STAGE_CONFIG = StageConfig(
    augmentation=AugmentationConfig(
        scales=(64, 72, 80), max_size=96, crop=0.5, crop_resize=(72, 80), crop_min=48, crop_max=72
    ),
    batch=BatchConfig(global_size=GLOBAL_BATCH, microbatch=1),
    optimizer=OptimizerConfig(learning_rate=2e-4, backbone_learning_rate=1e-4, clip_norm=0.1),
    schedule=ScheduleConfig(steps=50, warmup_steps=5, drop_at=(0.8,)),
    checkpoint=CheckpointConfig(every_steps=0),
    precision="fp32",
    ema_decay=0.9,
    log_every_steps=1,
)


def pack_pictures(folder: Path) -> Path:
    """Shards of pictures, a third of which have lost all their boxes."""
    split = write_synthetic(folder / "raw", "scenes", seed=3, train=IMAGES, validation=1)["train"]
    content = json.loads(split.annotations.read_text())
    bare = {image["id"] for image in content["images"][::3]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] not in bare]
    split.annotations.write_text(json.dumps(content))
    pack(split.annotations, [split.images], folder / "shards")
    return folder / "shards"


def chain(
    shards: Path, zero_stage: int, loader_workers: int, steps: int, model: ModelConfig = MODEL, **changes: Any
) -> ChainConfig:
    """A chain of one stage. changes: of STAGE_CONFIG."""
    stage = replace(
        STAGE_CONFIG,
        data=DataConfig(train=str(shards), loader_workers=loader_workers, log_samples=True),
        schedule=replace(STAGE_CONFIG.schedule, steps=steps),
        zero_stage=zero_stage,
        **changes,
    )
    return ChainConfig(seed=SEED, model=model, launch=LaunchConfig(engine="local"), stages={STAGE: stage})


@dataclass(frozen=True)
class Topology:
    """Who trains: the global batch of eight is cut in eight microbatches, workers deal them among themselves."""

    workers: int
    zero_stage: int


def run_all(
    shards: Path,
    folder: Path,
    topologies: Sequence[Topology],
    loader_workers: int,
    steps: int,
    model: ModelConfig = MODEL,
) -> list[Path]:
    """Run folders of runs that have the number of workers in common, one after the other in the same processes."""
    [workers] = {topology.workers for topology in topologies}
    runs = [folder / f"zero{topology.zero_stage}" for topology in topologies]
    jobs = [
        StageJob(str(run), STAGE, chain(shards, topology.zero_stage, loader_workers, steps, model))
        for run, topology in zip(runs, topologies, strict=True)
    ]
    run_ranks(_train, workers, jobs, timeout=900)
    return runs


def _train(jobs: list[StageJob]) -> None:
    for job in jobs:
        run_stage(job, _Silent())


class _Silent:
    """A worker's line to a driver that does not listen."""

    def report(self, event: Event) -> None:
        """Nobody watches."""

    def beat(self, step: int, own_seconds: float | None = None) -> None:
        """Nobody waits for a sign of life."""

    def stop_requested(self) -> bool:
        return False

    def save_requested(self) -> bool:
        return False


def metrics(run: Path) -> list[dict[str, Any]]:
    """The log of every step, which must all be there."""
    lines = [json.loads(line) for line in (run / STAGE / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def gradient_norms(run: Path) -> list[float]:
    return [line["gradient_norm"] for line in metrics(run)]


def samples(run: Path) -> list[list[int]]:
    return read_samples(run / STAGE / "samples")


def expected_samples(shards: Path, steps: int) -> list[list[int]]:
    return expected_images(shards, SEED, GLOBAL_BATCH, steps)


def box_counts(shards: Path) -> list[int]:
    """Of every image."""
    index = Index.open(shards)
    return [len(index.boxes(sample).labels) for sample in range(len(index))]


def weights(run: Path) -> dict[str, Tensor]:
    """What the stage hands on: the averaged weights."""
    return load_file(run / STAGE / "weights.safetensors")


def state(run: Path, kind: str) -> dict[str, Tensor]:
    """Full tensors of the last checkpoint: fp32, exp_avg, exp_avg_sq or ema."""
    return read_whole(list_checkpoints(run / STAGE / "checkpoints")[-1], kind)


def loss_differences(run: Path, reference: Path) -> list[float]:
    """Relative difference of the losses of every step."""
    return [abs(one - two) / abs(two) for one, two in zip(losses(run), losses(reference), strict=True)]


def loss_difference(run: Path, reference: Path) -> float:
    """The largest of them."""
    return max(loss_differences(run, reference))


def largest_change(run: Path, reference: Path) -> float:
    """L2 norm of the difference of all trained weights, relative to that of the weights."""
    one, two = (state(path, "fp32") for path in (run, reference))
    difference = sum(float((one[name].double() - two[name].double()).square().sum()) for name in two)
    return (difference / sum(float(value.double().square().sum()) for value in two.values())) ** 0.5


def different_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit by bit."""
    assert one.keys() == two.keys()
    return [name for name in one if one[name].numpy().tobytes() != two[name].numpy().tobytes()]
