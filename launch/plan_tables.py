"""Memory, traffic, reading, time and money of a plan, as tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from rich.table import Table

from launch.memory_check import USABLE
from launch.plan import StagePlan, possible_microbatches
from launch.plan_cost import duration, images_per_second, reading
from launch.plan_memory import recommend
from launch.plan_needs import StageNeeds

_MEGA, _GIGA = 1e6, 1e9
_MEMORY = ("parameters", "optimizer", "average", "gradients", "activations", "gathered", "bucket", "update", "all")


def demands(stages: Sequence[StagePlan], needs: StageNeeds, gpu_memory: float | None) -> Iterator[Table | str]:
    """Of stages that need the same. gpu_memory: GB of the GPU for which to recommend."""
    stage = stages[0]
    yield _memory_table(stages, needs)
    batch = needs.activations(stage.microbatch)
    yield (
        f"activations: {batch.saved / _MEGA:,.1f} MB wait for backward, {batch.batch / _MEGA:,.1f} MB are images; "
        f"host memory beside that: {needs.host(stage.microbatch) / _MEGA:,.0f} MB per worker with its loaders"
    )
    candidates = possible_microbatches(stage.global_size, stage.workers)
    if len(candidates) > 1:
        yield _microbatch_table(candidates, needs)
    if stage.workers > 1:
        yield _traffic_table(stage, needs)
    if gpu_memory is not None:
        yield _recommendation(candidates, stage, needs, gpu_memory * _GIGA)


def _memory_table(stages: Sequence[StagePlan], needs: StageNeeds) -> Table:
    stage, backbone = stages[0], needs.config.model.backbone
    height, width = needs.largest(stage.microbatch)
    names = ", ".join(one.name for one in stages)
    recomputed = ", backbone recomputed" if backbone.checkpoint_activations else ""
    title = (
        f"MB per worker in {names}: microbatch {stage.microbatch} of {height} x {width}, "
        f"{needs.stage.precision}{recomputed}, {stage.workers} worker(s), {needs.device}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("ZeRO")
    for heading in _MEMORY:  # as the fields of Memory
        table.add_column(heading, justify="right")
    for zero_stage in range(4):
        need = needs.memory(zero_stage, stage.microbatch)
        parts = [getattr(need, name) for name in _MEMORY[:-1]]
        table.add_row(_marked(zero_stage, stage), *(f"{part / _MEGA:,.0f}" for part in (*parts, need.total)))
    return table


def _microbatch_table(candidates: Sequence[int], needs: StageNeeds) -> Table:
    table = Table(title="MB per worker in all, by microbatch", title_justify="left")
    table.add_column("ZeRO")
    for microbatch in candidates:
        height, width = needs.largest(microbatch)
        table.add_column(f"{microbatch} of {height} x {width}", justify="right")
    for zero_stage in range(4):
        totals = [needs.memory(zero_stage, microbatch).total for microbatch in candidates]
        table.add_row(str(zero_stage), *(f"{total / _MEGA:,.1f}" for total in totals))
    return table


def _traffic_table(stage: StagePlan, needs: StageNeeds) -> Table:
    title = f"MB in one step: {stage.workers} workers, {stage.accumulation} microbatch(es) each"
    table = Table(title=title, title_justify="left")
    table.add_column("ZeRO")
    for heading in ("all-reduce", "reduce-scatter", "all-gather", "sent by each worker (ring)"):
        table.add_column(heading, justify="right")
    for zero_stage in range(4):
        moved = needs.traffic(zero_stage, stage.microbatch)
        parts = (moved.reduced, moved.scattered, moved.gathered, moved.sent(stage.workers))
        table.add_row(_marked(zero_stage, stage), *(f"{part / _MEGA:,.1f}" for part in parts))
    return table


def _marked(zero_stage: int, stage: StagePlan) -> str:
    return f"{zero_stage} (configured)" if zero_stage == stage.zero_stage else str(zero_stage)


def _recommendation(candidates: Sequence[int], stage: StagePlan, needs: StageNeeds, gpu: float) -> str:
    usable = USABLE * gpu
    choice = recommend(int(usable), candidates, needs.memory, needs.sent)
    limit = f"{gpu / _GIGA:.0f} GB, of which {usable / _GIGA:.1f} are taken to be usable"
    if choice is None:
        least = min(needs.memory(zero_stage, candidates[0]).total for zero_stage in range(4))
        return f"nothing fits into {limit}: at least {least / _GIGA:.1f} GB are needed: use smaller images"
    note = "" if choice.microbatch == stage.microbatch else " (another microbatch is another trajectory)"
    return (
        f"for {limit}: ZeRO {choice.zero_stage}, microbatch {choice.microbatch}{note}, which needs "
        f"{choice.memory.total / _GIGA:.1f} GB"
    )


def costs(stages: Sequence[StagePlan], options: argparse.Namespace) -> Iterator[Table | str]:
    """What nodes read in an epoch and, where a rate is given, how long the stages take."""
    readable = [stage for stage in stages if stage.train.images and stage.train.shards and stage.train.bytes]
    if readable:
        yield _reading_table(readable, options.workers_per_node)
    if options.images_per_second is None:
        return
    rate = images_per_second(options.images_per_second, stages[0].workers)
    table = Table(title=f"at {rate:,.1f} images/s of {stages[0].workers} worker(s)", title_justify="left")
    table.add_column("stage")
    for heading in ("steps", "s per step", "hours", "worker hours", "cost"):
        table.add_column(heading, justify="right")
    for stage in stages:
        step = f"{stage.global_size / rate:,.3f}"
        if stage.steps is None:
            table.add_row(stage.name, "?", step, "?", "?", "?")
            continue
        took = duration(stage.steps, stage.global_size, rate, stage.workers, options.price_per_hour)
        cost = "no price given" if took.cost is None else f"{took.cost:,.2f}"
        table.add_row(stage.name, f"{stage.steps:,}", step, f"{took.hours:,.2f}", f"{took.worker_hours:,.1f}", cost)
    yield table
    yield "without evaluation, checkpoints and start-up"


def _reading_table(stages: Sequence[StagePlan], workers_per_node: int) -> Table:
    nodes = -(-stages[0].workers // workers_per_node)
    table = Table(title=f"read by each of {nodes} node(s) in an epoch", title_justify="left")
    table.add_column("stage")
    for heading in ("images", "MB", "shards touched"):
        table.add_column(heading, justify="right")
    for stage in stages:
        data = stage.train
        assert data.images and data.bytes and data.shards
        part = reading(data.images, data.bytes, data.shards, nodes)
        table.add_row(
            stage.name, f"{part.images:,}", f"{part.bytes / _MEGA:,.1f}", f"{part.shards:,} of {data.shards:,}"
        )
    return table
