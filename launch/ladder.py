"""The ladder of ancestors: the four detectors that lead to DINO, trained alike on one synthetic set and compared.

Each rung is a chain of one stage (configs/chain/ladder) that differs from the others in switches of the model alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

from data_pipeline.index import Index
from data_pipeline.loader import evaluation_batches
from data_pipeline.pack import pack
from data_pipeline.synthetic import write_synthetic
from dino_scale.checkpoint.store import list_checkpoints
from dino_scale.checkpoint.whole import read_whole
from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig, StageConfig
from dino_scale.errors import UserError
from dino_scale.evaluation.instability import Instability, instability, matched_queries
from dino_scale.model.dino import build_model
from dino_scale.structures import Batch
from launch.chain import run_chain
from launch.engines import open_engine
from launch.preflight import check
from launch.progress import Progress
from launch.run_folder import RunFolder

FOLDER = Path(__file__).parents[1] / "configs" / "chain" / "ladder"
RUNGS = ("deformable_detr", "dab_deformable_detr", "dn_deformable_detr", "dino")
STAGE = "train"
_KEEP_ALL = 10**6
_WARMUP_SHARE = 10  # of the steps, at most one in so many is warm-up


@dataclass(frozen=True)
class Plan:
    """What every rung gets alike. images, validation: pictures to draw. workers: 1 is this process, more need Ray."""

    steps: int
    images: int
    validation: int
    seeds: tuple[int, ...]
    workers: int


@dataclass(frozen=True)
class Rung:
    """One trained detector. changes: of its matching, from each epoch to the next, on the validation pictures."""

    name: str
    seed: int
    parameters: int
    metrics: dict[str, float]
    changes: tuple[Instability, ...]
    seconds: float

    @property
    def share(self) -> float:
        return mean(change.share for change in self.changes)

    @property
    def queries(self) -> float:
        return mean(change.queries for change in self.changes)


def run_ladder(plan: Plan, run_dir: Path, progress: Progress) -> Iterator[Rung]:
    """Train and evaluate every rung with every seed in a new folder; each is yielded as it is done."""
    chains = [rung_chain(name, seed, plan, run_dir / "data") for seed in plan.seeds for name in RUNGS]
    draw_data(run_dir / "data", plan)
    engine = open_engine(chains[0].launch)
    check(chains[0], engine.workers)
    with engine:
        for chain in chains:
            progress.message(f"{chain.name}, seed {chain.seed}")
            folder = RunFolder.create(run_dir / f"{chain.name}_seed{chain.seed}", chain)
            begin = time.monotonic()
            run_chain(folder, engine, progress)
            seconds = time.monotonic() - begin
            yield measure(folder, seconds)


def rung_chain(name: str, seed: int, plan: Plan, data: Path) -> ChainConfig:
    """The chain of a rung with the plan's numbers; a checkpoint after every epoch shows how the matching moved."""
    if not (FOLDER / f"{name}.yaml").is_file():
        raise UserError(f"{FOLDER / name}.yaml is missing: the ladder runs from a checkout of the repository")
    chain = load_chain(FOLDER / f"{name}.yaml")
    stage = chain.stages[STAGE]
    epoch = plan.images // stage.batch.global_size
    if epoch < 1 or plan.steps < 2 * epoch:
        raise UserError(
            f"{plan.steps} steps over {plan.images} images in batches of {stage.batch.global_size}: expected at least "
            "two epochs, or no change between epochs can be seen; raise --steps or lower --images"
        )
    warmup = min(stage.schedule.warmup_steps, plan.steps // _WARMUP_SHARE)
    stage = replace(
        stage,
        data=replace(stage.data, train=str(data / "train"), validation=str(data / "validation")),
        schedule=replace(stage.schedule, steps=plan.steps, warmup_steps=warmup),
        checkpoint=replace(stage.checkpoint, every_steps=epoch, keep_last=_KEEP_ALL),
    )
    launch = chain.launch
    if plan.workers > 1:
        launch = replace(launch, engine="ray", workers=plan.workers, threads=1)
    return replace(chain, seed=seed, launch=launch, stages={STAGE: stage})


def draw_data(folder: Path, plan: Plan) -> None:
    """folder/train and folder/validation, shards of the domain `objects`; the same pictures for every rung and seed."""
    folder.mkdir(parents=True)
    splits = write_synthetic(folder / "raw", "objects", 0, plan.images, plan.validation)
    for name, split in splits.items():
        pack(split.annotations, [split.images], folder / name, "coco")


def measure(folder: RunFolder, seconds: float) -> Rung:
    """The result of a finished rung."""
    chain = folder.config
    stage = chain.stages[STAGE]
    validation = Index.open(Path(stage.data.validation))
    model = build_model(chain.model, len(validation.categories), pretrained=False)
    matched = []
    for checkpoint in list_checkpoints(folder.path / STAGE / "checkpoints"):
        # The weights as trained, not their average, which would hide what is to be seen.
        model.load_state_dict(read_whole(checkpoint, "fp32"))
        data = stage.data
        batches = _fixed_batches(validation, stage)
        matched.append(
            matched_queries(model, batches, stage.loss, mean=data.mean, std=data.std, precision=stage.precision)
        )
    changes = tuple(instability(before, after) for before, after in pairwise(matched))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Rung(chain.name, chain.seed, parameters, folder.stages[STAGE].metrics, changes, seconds)


def _fixed_batches(index: Index, stage: StageConfig) -> Iterator[Batch]:
    evaluation = stage.evaluation
    return evaluation_batches(
        index,
        short_side=evaluation.short_side,
        max_size=evaluation.max_size,
        microbatch=evaluation.microbatch,
        rank=0,
        world=1,
    )


def averages(rungs: Sequence[Rung]) -> list[tuple[str, int, float, float, float, float, float]]:
    """Per rung, over seeds: name, parameters, AP, AP50, instability as share of boxes and in queries, seconds."""
    rows = []
    for name in RUNGS:
        own = [rung for rung in rungs if rung.name == name]
        if own:
            score = [mean(rung.metrics[key] for rung in own) for key in ("AP", "AP50")]
            change = [mean(rung.share for rung in own), mean(rung.queries for rung in own)]
            seconds = mean(rung.seconds for rung in own)
            rows.append((name, own[0].parameters, score[0], score[1], change[0], change[1], seconds))
    return rows
