"""Every key a configuration may hold: frozen dataclasses, decoded from YAML by their types (`decode.py`).

The comment beside a field gives its unit and, where a value is published, its source. "paper" is arXiv 2203.03605,
"official" the authors' repository. Checks of a single value live beside it in `__post_init__`; they raise ConfigError.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from dino_scale.errors import ConfigError

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model with `features_only`."""

    name: str = "resnet50"  # any timm architecture that offers features_only
    arguments: dict[str, str | int | float | bool | list[int]] = field(
        default_factory=dict
    )  # passed to timm as they are
    outputs: tuple[int, ...] = (2, 3, 4)  # timm feature indices; ResNet strides 2, 4, 8, 16, 32 are 0..4
    weights: str = ""  # local file of timm weights (.safetensors or .pth); empty: random initialisation
    norm: Literal["frozen_batch", "group", "native"] = "frozen_batch"  # official: frozen_batch for ResNet
    frozen_stages: int = 1  # feature stages that do not train, counted from the stem; official ResNet: stem + layer1
    drop_path: float = 0.0  # stochastic depth rate of the last block; official Swin-L 0.2
    checkpoint_activations: bool = False  # recompute activations in backward; official Swin-L: true


@dataclass(frozen=True)
class DenoisingConfig:
    """Queries that are noised ground truth (paper 3.3)."""

    kind: Literal["none", "plain", "contrastive"] = "contrastive"  # plain: DN-DETR; contrastive: DINO
    queries: int = (
        100  # positive queries per image to aim for; groups = queries // most boxes of an image (official dn_number)
    )
    box_noise: float = 1.0  # share of half the box size; every official script runs with 1.0
    label_noise: float = 0.5  # half of this share of the labels is drawn anew (official)


@dataclass(frozen=True)
class ModelConfig:
    """The detector. Defaults: DINO 4-scale with ResNet-50 (official config/DINO/DINO_4scale.py)."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    hidden: int = 256  # channels of every token
    heads: int = 8  # attention heads
    levels: int = 4  # feature levels; those beyond the backbone's outputs come from stride-2 convolutions
    points: int = 4  # sampling points per head and level
    feedforward: int = 2048  # hidden channels of the feed-forward blocks
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.0
    queries: int = 900  # matching queries
    position_temperature: float = 20.0  # of the image position encoding (official pe_temperatureH/W)
    query_selection: Literal["none", "pure", "mixed"] = "mixed"  # paper 3.4
    query_form: Literal["anchor", "point"] = "anchor"  # anchor: 4-D boxes (DAB-DETR); point: 2-D (Deformable DETR)
    refinement: bool = True  # boxes refined layer by layer
    look_forward: Literal["once", "twice"] = "twice"  # paper 3.5
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    attention: Literal["auto", "triton", "cpu", "reference"] = "auto"  # kernels/deform_attn implementation

    def __post_init__(self) -> None:
        _require(
            self.hidden % self.heads == 0,
            f"model.hidden is {self.hidden}: expected a multiple of model.heads ({self.heads})",
        )
        _require(
            self.levels >= len(self.backbone.outputs),
            f"model.levels is {self.levels}: expected at least the number of backbone outputs, "
            f"{len(self.backbone.outputs)}",
        )


@dataclass(frozen=True)
class LossConfig:
    """Set prediction loss (official SetCriterion and HungarianMatcher)."""

    class_weight: float = 1.0
    box_weight: float = 5.0  # L1 on centre, width, height in [0, 1]
    giou_weight: float = 2.0
    encoder_weight: float = 1.0  # factor on the loss of the selected encoder proposals (official interm_loss_coef)
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    match_class_cost: float = 2.0
    match_box_cost: float = 5.0
    match_giou_cost: float = 2.0


@dataclass(frozen=True)
class DataConfig:
    """Shard folders made by `dino-scale pack`: on disk, or addresses (s3://, gs://, http://, https://)."""

    train: str = ""  # folder
    validation: str = ""  # folder; empty: no evaluation
    cache: str = ""  # folder on each node for copies from addresses; empty: one in the system's temporary folder
    cache_shards: bool = False  # copy whole shards from addresses, instead of asking for one image at a time
    cache_gigabytes: float = 0.0  # (10^9 bytes) all shards in `cache` together, least recently used go; 0: no limit
    loader_workers: int = 2  # processes per training worker; 0: read in the training process
    # windowed: four shards at a time; size_planned: like sizes share a microbatch
    order: Literal["permutation", "windowed", "size_planned"] = "permutation"
    bad_share: float = 0.001  # unreadable images may be replaced up to this share of those seen (at least one epoch)
    pad_multiple: int = 1  # padded height and width are rounded up to a multiple of this, for compiled models
    log_samples: bool = False  # write the image ids of every step to samples/ in the stage's folder
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1] (ImageNet)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        _require(
            0 <= self.cache_gigabytes < math.inf,
            f"data.cache_gigabytes is {self.cache_gigabytes}: expected 0 (no limit) or more",
        )
        _require(0 <= self.bad_share <= 1, f"data.bad_share is {self.bad_share}: expected a share from 0 to 1")
        _require(self.pad_multiple >= 1, f"data.pad_multiple is {self.pad_multiple}: expected 1 or more pixels")


@dataclass(frozen=True)
class AugmentationConfig:
    """DETR's training augmentation (official datasets/coco.py); sizes in pixels."""

    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # short side, one drawn
    max_size: int = 1333  # longest side
    flip: float = 0.5  # probability of a horizontal flip
    crop: float = 0.5  # probability of the branch resize -> crop -> resize
    crop_resize: tuple[int, ...] = (400, 500, 600)  # short side before the crop
    crop_min: int = 384  # smallest side of the crop
    crop_max: int = 600  # largest side of the crop
    executor: Literal["fast", "reference"] = "fast"  # reference: Pillow, the official arithmetic; fast: within 2/255


@dataclass(frozen=True)
class BatchConfig:
    """global_size = microbatch x workers x accumulation; the trajectory depends on global_size and microbatch only."""

    global_size: int = 16  # images per optimizer step (official 16)
    microbatch: int = 2  # images a worker puts through the model at once

    def __post_init__(self) -> None:
        _require(
            self.microbatch > 0 and self.global_size % self.microbatch == 0,
            f"batch.global_size is {self.global_size}: expected a multiple of batch.microbatch ({self.microbatch})",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (official: two groups, weight decay on every parameter)."""

    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    backbone_layer_decay: float = 1.0  # factor on the backbone's rate per block away from its last one; 1: one rate
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_norm: float = 0.1  # L2 norm of the whole gradient; 0: no clipping

    def __post_init__(self) -> None:
        _require(
            0 < self.backbone_layer_decay <= 1,
            f"optimizer.backbone_layer_decay is {self.backbone_layer_decay}: expected above 0 and at most 1",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of a stage and its learning-rate curve. Give `epochs` or `steps`, not both."""

    epochs: float = 0.0
    steps: int = 0  # optimizer steps
    warmup_steps: int = 0  # linear from 0; official: none
    decay: Literal["step", "cosine"] = "step"
    drop_at: tuple[
        float, ...
    ] = ()  # shares of the stage after which the rate is multiplied by drop_factor; 11 of 12 epochs = 0.9167
    drop_factor: float = 0.1
    final_factor: float = 0.0  # cosine only: rate at the end relative to the start

    def __post_init__(self) -> None:
        _require(
            (self.epochs > 0) != (self.steps > 0),
            f"schedule.epochs is {self.epochs} and schedule.steps is {self.steps}: "
            "expected exactly one of them above 0",
        )


@dataclass(frozen=True)
class StartConfig:
    """Where the weights of a stage come from."""

    stage: str = ""  # name of an earlier stage of the chain
    weights: str = ""  # path of a weights file; empty with an empty stage: from scratch
    class_map: Literal["name", "reinitialise"] = "name"  # name: rows of equal (or mapped) class names carry over
    class_choices: dict[str, str] = field(
        default_factory=dict
    )  # class of this stage -> class of the weights to start from, where the built-in table is not what is wanted

    def __post_init__(self) -> None:
        _require(
            not (self.stage and self.weights),
            f"start.stage is '{self.stage}' and start.weights is '{self.weights}': expected at most one of them",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000  # 0: not by steps; at the end and when interrupted a checkpoint is always written
    every_minutes: float = 0.0  # since the last one began, by the clock of rank 0; 0: not by time
    keep_last: int = 3  # older ones are deleted
    keep_best: bool = False  # also keep that of the evaluation with the highest AP, as best_XXXXXXXX

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, f"checkpoint.every_steps is {self.every_steps}: expected 0 (off) or more")
        _require(self.every_minutes >= 0, f"checkpoint.every_minutes is {self.every_minutes}: expected 0 (off) or more")
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}: expected at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int = 0  # 0: only at the end of the stage
    short_side: int = 800  # pixels (official 800)
    max_size: int = 1333  # pixels
    microbatch: int = 1  # images at once; padding changes results slightly, official 1
    detections: int = 300  # per image handed to COCO evaluation (official num_select)


def _stage_schedule() -> ScheduleConfig:
    return ScheduleConfig(epochs=12, drop_at=(11 / 12,))


@dataclass(frozen=True)
class StageConfig:
    """One training run over one dataset with one schedule."""

    data: DataConfig = field(default_factory=DataConfig)
    start: StartConfig = field(default_factory=StartConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=_stage_schedule)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # bf16: autocast; parameters, coordinates and losses stay fp32. bf16_parameters: parameters are bf16 too, beside
    # fp32 masters that DeepSpeed splits; needs zero_stage 1 to 3
    precision: Literal["fp32", "bf16", "bf16_parameters"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1  # DeepSpeed ZeRO
    ema_decay: float = 0.0  # exponential moving average of the weights per step; 0: off (official 0.9997 when on)
    log_every_steps: int = 10
    non_finite_limit: int = 10  # steps of a stage that may be left out for a gradient that is not finite

    def __post_init__(self) -> None:
        _require(
            self.precision != "bf16_parameters" or self.zero_stage > 0,
            "precision is bf16_parameters with zero_stage 0: expected zero_stage 1, 2 or 3 with it, or precision bf16 "
            "(DeepSpeed's optimizer for this pair differs from the others and cannot be resumed under them)",
        )


@dataclass(frozen=True)
class WorkerRange:
    """As many workers as the machines at hand allow, within these bounds; more or fewer while the run goes on."""

    min: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        _require(self.min >= 1, f"launch.workers.min is {self.min}: expected at least 1")
        _require(
            self.max >= self.min,
            f"launch.workers.max is {self.max}: expected at least launch.workers.min ({self.min})",
        )


@dataclass(frozen=True)
class LaunchConfig:
    engine: Literal["ray", "local", "torchrun"] = "ray"
    # training processes, one per accelerator: N, or {min: A, max: B} to follow the machines that come and go
    workers: int | WorkerRange = 1  # (ray only; local has 1, torchrun brings its own number)
    threads: int = 1  # CPU threads of each training process; 0: torch's own choice
    address: str = "local"  # ray only: "local" starts Ray on this machine, "auto" or host:port joins a cluster
    # ray only: how often a stage starts again after lost workers or machines, counted anew after every checkpoint
    retries: int = 5
    # ray only: workers without a sign of life for this long start again; so long a run waits for machines it lacks
    patience_minutes: float = 30.0  # (steps and images of an evaluation count as signs of life)
    insecure: bool = False  # ray only: join a cluster that asks for no token, where anyone can run code
    check_memory: bool = True  # refuse what cannot fit into this machine (hosts of a cluster elsewhere are not seen)
    notice_file: str = ""  # ray only: a machine on which this file appears is about to be taken away; empty: none

    def __post_init__(self) -> None:
        if isinstance(self.workers, int):
            _require(self.workers >= 1, f"launch.workers is {self.workers}: expected at least 1")
        _require(self.threads >= 0, f"launch.threads is {self.threads}: expected 0 (torch's choice) or more")
        _require(self.retries >= 0, f"launch.retries is {self.retries}: expected 0 or more")
        _require(self.patience_minutes > 0, f"launch.patience_minutes is {self.patience_minutes}: expected more than 0")

    def worker_range(self) -> WorkerRange:
        """Bounds on the number of workers; equal ones where the number is fixed."""
        workers = self.workers
        return WorkerRange(workers, workers) if isinstance(workers, int) else workers


@dataclass(frozen=True)
class ChainConfig:
    """An ordered list of stages that share one model."""

    name: str = "chain"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)  # in order of execution

    def __post_init__(self) -> None:
        for key, name in (("name", self.name), *((f"stages.{stage}", stage) for stage in self.stages)):
            _require(
                _FOLDER_NAME.fullmatch(name) is not None,
                f"{key} is '{name}': expected letters, digits, - and _ (it becomes a folder's name)",
            )
        _require(bool(self.stages), "stages is empty: expected at least one stage")
        earlier: set[str] = set()
        for name, stage in self.stages.items():
            _require(
                not stage.start.stage or stage.start.stage in earlier,
                f"stages.{name}.start.stage is '{stage.start.stage}': "
                f"expected an earlier stage ({', '.join(sorted(earlier)) or 'none'})",
            )
            earlier.add(name)
