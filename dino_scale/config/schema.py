"""Every key a configuration may hold: frozen dataclasses, decoded from YAML by their types (`decode.py`).

The comment beside a field gives its unit and, where a value is published, its source. "paper" is arXiv 2203.03605,
"official" the authors' repository. Checks of a single value live beside it in `__post_init__`; they raise ConfigError.
"""

from __future__ import annotations

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
    loader_workers: int = 2  # processes per training worker; 0: read in the training process
    # windowed: neighbours in the shards stay near; size_planned: like sizes share a microbatch
    order: Literal["permutation", "windowed", "size_planned"] = "permutation"
    bad_share: float = 0.001  # unreadable images may be replaced up to this share of those seen (at least one epoch)
    pad_multiple: int = 1  # padded height and width are rounded up to a multiple of this, for compiled models
    log_samples: bool = False  # write the image ids of every step to samples/ in the stage's folder
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1] (ImageNet)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
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
    every_steps: int = 1000  # 0: only at the end and when interrupted
    keep_last: int = 3  # older ones are deleted


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
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast; parameters, coordinates and losses stay fp32
    zero_stage: Literal[0, 1, 2, 3] = 1  # DeepSpeed ZeRO
    ema_decay: float = 0.0  # exponential moving average of the weights per step; 0: off (official 0.9997 when on)
    log_every_steps: int = 10
    non_finite_limit: int = 10  # steps with a non-finite loss that may be skipped before the run stops


@dataclass(frozen=True)
class LaunchConfig:
    engine: Literal["ray", "local", "torchrun"] = "ray"
    workers: int = 1  # training processes, one per accelerator (ray only; local has 1, torchrun brings its own number)
    threads: int = 1  # CPU threads of each training process; 0: torch's own choice
    address: str = "local"  # ray only: "local" starts Ray on this machine, "auto" or host:port joins a cluster

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"launch.workers is {self.workers}: expected at least 1")
        _require(self.threads >= 0, f"launch.threads is {self.threads}: expected 0 (torch's choice) or more")


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
