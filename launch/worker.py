"""What one training process does for one stage; the same function under every engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from data_pipeline.categories import class_aliases
from data_pipeline.dataset import open_dataset
from data_pipeline.index import Index, ground_truth
from data_pipeline.loader import evaluation_batches, microbatches_per_rank, training_microbatches
from data_pipeline.replacement import BadSample
from dino_scale.checkpoint import store
from dino_scale.checkpoint.reshape import reshape
from dino_scale.checkpoint.transfer import Transfer, carry_over, match_classes
from dino_scale.checkpoint.weights import Preparation, Weights, load_weights, save_weights
from dino_scale.config.schema import ChainConfig, StageConfig
from dino_scale.errors import ConfigError
from dino_scale.evaluation.detector import detect_all, evaluate_over_ranks, gather_detections
from dino_scale.evaluation.result import EvaluationResult
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import Dino, build_model
from dino_scale.precision import BF16_PARAMETERS
from dino_scale.structures import Batch
from dino_scale.training import distributed
from dino_scale.training.control import Control, EvaluationEvent, MessageEvent
from dino_scale.training.ema import KIND as AVERAGE
from dino_scale.training.ema import WeightAverage
from dino_scale.training.metrics import MetricsLog
from dino_scale.training.objective import Objective
from dino_scale.training.optimizer import aligned, group_table, parameter_groups
from dino_scale.training.prefetch import on_device
from dino_scale.training.sample_log import open_log
from dino_scale.training.schedule import total_steps
from dino_scale.training.trainer import Progress, StageLength, Trainer
from dino_scale.training.zero import ZeroEngine
from launch.same_samples import require_same_position
from launch.stage_checkpoints import StageCheckpoints

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to know to run a stage; travels between processes."""

    run_dir: str
    stage: str
    config: ChainConfig


@dataclass(frozen=True)
class StageResult:
    """How a stage ended; the same on every rank. metrics: COCO numbers of the last evaluation, empty without one."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def run_stage(job: StageJob, control: Control) -> StageResult:
    """Train, evaluate and save one stage; continues from its newest checkpoint. Needs a joined process group."""
    if job.config.launch.threads > 0:
        torch.set_num_threads(job.config.launch.threads)
    run = _StageRun(job, control)
    try:
        return run.execute()
    finally:
        run.checkpoints.close()
        run.engine.destroy()


class _StageRun:
    """The parts of a stage on this rank, and what is done with them."""

    def __init__(self, job: StageJob, control: Control) -> None:
        self.job, self.control = job, control
        self.config: StageConfig = job.config.stages[job.stage]
        self.folder = Path(job.run_dir) / job.stage
        data = self.config.data
        cache = (data.cache, data.cache_shards, data.cache_gigabytes)
        self.index = open_dataset(data.train, *cache)
        self.validation = open_dataset(data.validation, *cache) if data.validation else None
        self._require_same_classes()
        batch = self.config.batch
        self.accumulation = microbatches_per_rank(batch, distributed.world_size())
        steps = total_steps(self.config.schedule, len(self.index), batch.global_size)
        self.length = StageLength(len(self.index), steps, batch.global_size)
        root = self.folder / "checkpoints"
        newest = store.find_newest_together(root, self._say)
        self.engine = self._build_engine(self._build_model(fresh=newest is None))
        self.average = WeightAverage(self.engine, self.config.ema_decay) if self.config.ema_decay > 0 else None
        self.progress = Progress() if newest is None else self._continue_from(*newest)
        self.checkpoints = StageCheckpoints(
            root,
            self.engine,
            self.config.checkpoint,
            seed=self.job.config.seed,
            index_digest=self.index.digest,
            global_size=self.length.global_size,
            say=self._say,
            present="" if newest is None else newest[0].name,
        )
        self.metrics: dict[str, float] = {}

    def execute(self) -> StageResult:
        trainer = Trainer(
            self.job.stage,
            self.config,
            self.job.config.seed,
            self.length,
            self.engine,
            self.average,
            MetricsLog(self.folder / "metrics.jsonl", self.progress.step, enabled=distributed.rank() == 0),
            self.control,
            self.checkpoints,
            evaluate=self._evaluate,
            samples=open_log(self.folder / "samples", self.progress.step, wanted=self.config.data.log_samples),
        )
        start = self.progress.step
        if trainer.run(self._data(), self.progress):
            return StageResult(self.progress.step, interrupted=True)
        if self.progress.step > start:
            self.checkpoints.save(self.progress, required=True)
        self._finish()
        return StageResult(self.progress.step, self.metrics)

    def _require_same_classes(self) -> None:
        if self.validation is not None and self.validation.categories != self.index.categories:
            raise ConfigError(
                f"stages.{self.job.stage}.data: the categories of {self.config.data.validation} differ from those of "
                f"{self.config.data.train}: pack both from annotation files with the same category list"
            )

    def _build_model(self, fresh: bool) -> Dino:
        torch.manual_seed(self.job.config.seed)
        start = self._start_weights() if fresh else None
        pretrained = fresh and start is None
        model = build_model(self.job.config.model, len(self.index.categories), pretrained=pretrained)
        if start is not None:
            transfer = start_from(model, start, self.index, self.config)
            self._say(f"weights from {start}: {transfer.summary()}")
            for line in transfer.table():
                self._say(line)
            if distributed.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "transfer.txt").write_text("\n".join(transfer.table()) + "\n", encoding="utf-8")
        return model.to(distributed.device())

    def _start_weights(self) -> Path | None:
        start = self.config.start
        if start.stage:
            return Path(self.job.run_dir) / start.stage / WEIGHTS
        return Path(start.weights) if start.weights else None

    def _build_engine(self, model: Dino) -> ZeroEngine:
        data, optimizer = self.config.data, self.config.optimizer
        criterion = Criterion(self.config.loss)
        groups = parameter_groups(model, optimizer)
        for line in aligned(group_table(groups)):
            self._say(line)
        return ZeroEngine(
            Objective(model, criterion, precision=self.config.precision, mean=data.mean, std=data.std),
            model,
            groups,
            stage=self.config.zero_stage,
            microbatch=self.config.batch.microbatch,
            accumulation=self.accumulation,
            clip_norm=optimizer.clip_norm,
            betas=optimizer.betas,
            epsilon=optimizer.epsilon,
            bf16_parameters=self.config.precision == BF16_PARAMETERS,
        )

    def _continue_from(self, folder: Path, manifest: store.Manifest) -> Progress:
        expected = (self.job.config.seed, self.index.digest, self.length.global_size)
        require_same_position(folder, manifest, *expected)
        store.load(folder, manifest, self.engine)
        self._say(
            f"continues from {folder.name} (written by {manifest.world_size} workers, ZeRO {manifest.zero_stage})"
        )
        return Progress(manifest.step, manifest.skipped_steps, manifest.best)

    def _data(self) -> Iterator[list[Batch]]:
        device = distributed.device()
        steps = training_microbatches(
            self.index,
            seed=self.job.config.seed,
            augmentation=self.config.augmentation,
            batch=self.config.batch,
            rank=distributed.rank(),
            world=distributed.world_size(),
            first_step=self.progress.step,
            last_step=self.length.steps,
            loader_workers=self.config.data.loader_workers,
            order=self.config.data.order,
            pad_multiple=self.config.data.pad_multiple,
            on_bad=self._note_bad,
            pin=device.type == "cuda",
        )
        return on_device(steps, device)

    def _note_bad(self, bad: BadSample) -> None:
        """One line in bad_samples.jsonl; every rank appends its own, a short append is not torn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "bad_samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"rank": distributed.rank(), **asdict(bad)}) + "\n")
        self._say(f"image {bad.image_id} could not be read, image {bad.replaced_by} takes its place: {bad.reason}")

    def _state(self) -> dict[str, torch.Tensor]:
        kind = AVERAGE if self.average is not None else "fp32"
        return self.engine.gather(kind) | self.engine.untrained()

    def _evaluate(self, progress: Progress) -> None:
        """COCO numbers of the present (averaged, if on) weights over all ranks; written by rank 0."""
        if self.validation is None:
            return
        model = build_model(self.job.config.model, len(self.index.categories), pretrained=False)
        model.load_state_dict(self._state())
        evaluation, data = self.config.evaluation, self.config.data
        batches = evaluation_batches(
            self.validation,
            short_side=evaluation.short_side,
            max_size=evaluation.max_size,
            microbatch=evaluation.microbatch,
            rank=distributed.rank(),
            world=distributed.world_size(),
        )
        own = detect_all(
            model.to(distributed.device()),
            self._with_beats(batches),
            self.index.categories,
            mean=data.mean,
            std=data.std,
            detections=evaluation.detections,
            precision=self.config.precision,
        )
        found = gather_detections(own)
        result = evaluate_over_ranks(ground_truth(self.validation), found)
        self.metrics = dict(result.metrics)
        if distributed.rank() == 0:
            write_evaluation(self.folder / "evaluation", progress.step, result, found)
            self.control.report(EvaluationEvent(self.job.stage, progress.step, self.metrics))
        self.checkpoints.evaluated(progress, self.metrics)

    def _with_beats(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.control.beat(self.progress.step)
            yield batch

    def _finish(self) -> None:
        """The stage's result: its last evaluation and its weights file, and a checkpoint that is on the disk."""
        self._evaluate(self.progress)
        self.checkpoints.settle()
        state = self._state()
        if distributed.rank() == 0:
            data, evaluation = self.config.data, self.config.evaluation
            preparation = Preparation(
                data.mean, data.std, evaluation.short_side, evaluation.max_size, evaluation.detections
            )
            weights = Weights(state, self.job.config.model, self.index.categories, preparation)
            save_weights(self.folder / WEIGHTS, weights)
        distributed.barrier()

    def _say(self, text: str) -> None:
        if distributed.rank() == 0:
            self.control.report(MessageEvent(f"{self.job.stage}: {text}"))


def start_from(model: Dino, path: Path, index: Index, config: StageConfig) -> Transfer:
    """Fill a new model with the weights at `path`, class rows by class name."""
    weights = load_weights(path)
    by_name = config.start.class_map == "name"
    choices = config.start.class_choices
    pairs = match_classes(weights.categories, index.categories, class_aliases(), choices) if by_name else []
    target = model.state_dict()
    fitted = reshape(weights.state, weights.model, target, model.config)
    return carry_over(
        fitted.state, target, model.class_tensors(), pairs, weights.categories, index.categories, fitted.changes
    )


def write_evaluation(folder: Path, step: int, result: EvaluationResult, found: list[dict]) -> None:
    """evaluation/step_XXXXXXXX.json and its detections, each written beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step_{step:08d}"
    for name, text in ((f"{stem}_detections.json", json.dumps(found)), (f"{stem}.json", result.to_json())):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
