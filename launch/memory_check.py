"""Refusing, before a step is done, a chain that cannot fit into the memory that its workers have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.dataset import open_dataset
from dino_scale.config.schema import ChainConfig, LaunchConfig, WorkerRange
from dino_scale.errors import UserError
from launch.elastic import worker_counts
from launch.plan import largest_image, possible_microbatches
from launch.plan_memory import memory
from launch.plan_needs import Measured, StageNeeds

_GIGABYTE = 1e9
USABLE = 0.9  # of a GPU's memory; the rest is assumed for CUDA's context, NCCL, workspaces and fragmentation
# More than any detector in configs/ needs in any precision (19,000 for Swin-L 5-scale in float32 without
# recomputation): where even this fits, the seconds of measuring are saved.
_PLENTY_PER_PIXEL = 40_000


@dataclass(frozen=True)
class Room:
    """Bytes that one worker may use. device: "cuda" or "cpu"; where: as a message names it."""

    bytes: int
    device: str
    where: str


def room_here(workers_here: int) -> Room:
    """Of each of the workers on this machine: its GPU where there are any, else its share of the free host memory."""
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
        usable = int(USABLE * min(sizes))
        return Room(usable, "cuda", f"a GPU of {_gigabytes(min(sizes))}, of which {_gigabytes(usable)} can be used")
    free = free_host_memory()
    share = free // workers_here
    return Room(share, "cpu", f"{_gigabytes(free)} of free memory for {workers_here} worker(s) on this machine")


def check_memory(config: ChainConfig, workers: WorkerRange) -> None:
    """`require_memory` where it is known what the workers will find; those of a cluster say it when they have started
    (`require_memory_of`)."""
    here = workers_here(config.launch, workers.max)
    if config.launch.check_memory and here is not None:
        require_memory(config, workers, room_here(here))


def workers_here(launch: LaunchConfig, workers: int) -> int | None:
    """Workers on this machine; None where the cluster decides."""
    if launch.engine == "torchrun":
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return workers if launch.engine == "local" or launch.address == "local" else None


def require_memory_of(config: ChainConfig, stage: str, rooms: Mapping[str, Room]) -> None:
    """`require_memory` for one stage and the workers that are there. rooms: what each has, by its name."""
    name, room = min(rooms.items(), key=lambda item: item[1].bytes)
    room = replace(room, where=f"{room.where} ({name})")
    require_memory(config, WorkerRange(len(rooms), len(rooms)), room, [stage])


def require_memory(config: ChainConfig, bounds: WorkerRange, room: Room, stages: Sequence[str] | None = None) -> None:
    """UserError, naming stage, need, room and a remedy, for the first of `stages` (default: all) that does not fit."""
    measured: Measured = {}
    for name in stages or config.stages:
        stage = config.stages[name]
        workers = worker_counts(stage.batch, bounds)[-1]  # the fewer share the state, the more each needs
        classes = len(open_dataset(stage.data.train, stage.data.cache, stage.data.cache_shards).categories)
        needs = StageNeeds(config, name, classes, workers, room.device, measured)
        if _surely_fits(needs, room):
            continue
        need = _bytes_needed(needs, room, stage.zero_stage, stage.batch.microbatch)
        if need > room.bytes:
            height, width = needs.largest(stage.batch.microbatch)
            raise UserError(
                f"stages.{name} needs about {_gigabytes(need)} per worker (microbatch {stage.batch.microbatch}, images "
                f"up to {height} x {width}, ZeRO {stage.zero_stage}, {workers} worker(s)), but there is {room.where}: "
                f"{_remedy(name, needs, room)}, or skip this check with --set launch.check_memory=false"
            )


def _surely_fits(needs: StageNeeds, room: Room) -> bool:
    stage = needs.stage
    microbatch = stage.batch.microbatch
    height, width = largest_image(stage, microbatch)
    kept = memory(needs.size, stage.zero_stage, needs.workers, stage.ema_decay > 0, stage.precision, room.device)
    generous = kept.with_activations(_PLENTY_PER_PIXEL * microbatch * height * width).total
    return generous + _host_part(needs, room, microbatch) <= room.bytes


def _bytes_needed(
    needs: StageNeeds, room: Room, zero_stage: int, microbatch: int, recompute: bool | None = None
) -> int:
    return needs.memory(zero_stage, microbatch, recompute).total + _host_part(needs, room, microbatch)


def _host_part(needs: StageNeeds, room: Room, microbatch: int) -> int:
    return needs.host(microbatch) if room.device == "cpu" else 0


def _remedy(name: str, needs: StageNeeds, room: Room) -> str:
    """The first change of the configuration that would fit; those that keep the trajectory come first."""
    for setting, zero_stage, microbatch, recompute in _changes(name, needs):
        if _bytes_needed(needs, room, zero_stage, microbatch, recompute) <= room.bytes:
            return f"it would fit with --set {setting}"
    return f"lower stages.{name}.augmentation.max_size and scales, or use workers with more memory"


def _changes(name: str, needs: StageNeeds) -> Iterator[tuple[str, int, int, bool | None]]:
    """(setting, ZeRO stage, microbatch, recomputation) that need less than the configuration does."""
    stage, backbone = needs.stage, needs.config.model.backbone
    microbatch, zero_stage = stage.batch.microbatch, stage.zero_stage
    if needs.workers > 1:
        yield from ((f"stages.{name}.zero_stage={more}", more, microbatch, None) for more in range(zero_stage + 1, 4))
    if not backbone.checkpoint_activations:
        yield "model.backbone.checkpoint_activations=true", zero_stage, microbatch, True
    for fewer in sorted(possible_microbatches(stage.batch.global_size, needs.workers), reverse=True):
        if fewer < microbatch:
            yield f"stages.{name}.batch.microbatch={fewer}", zero_stage, fewer, None


def free_host_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes of this machine, or of this container where it has a limit, can still take."""

    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except OSError:  # no limit of this kind here
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def _gigabytes(size: float) -> str:
    return f"{size / _GIGABYTE:.1f} GB"
