"""What a stage costs: bytes over the links in every step, bytes read by every node, hours, money.

Traffic follows DeepSpeed 0.19.8 as `dino_scale/training/zero.py` sets it up (gradients travel by all-reduce in stages
1 and 2 too); tests/launch/test_plan_memory.py counts the messages of real engines against it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dino_scale.errors import UserError
from dino_scale.training.zero import PERSISTENT_PARAMETER
from launch.plan_memory import ELEMENT_BYTES, ModelSize

_HOUR = 3600.0


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors that collectives work on in one optimizer step."""

    reduced: int  # all-reduce
    scattered: int  # reduce-scatter
    gathered: int  # all-gather

    def sent(self, workers: int) -> int:
        """Bytes that each worker sends (and as many that it receives) with ring algorithms."""
        share = (workers - 1) / workers
        return round(share * (2 * self.reduced + self.scattered + self.gathered))


def traffic(size: ModelSize, zero_stage: int, workers: int, accumulation: int, precision: str) -> Traffic:
    """One step of `accumulation` microbatches. Frozen parameters travel in stage 3 alone."""
    if workers == 1:
        return Traffic(0, 0, 0)
    parameter, gradient = ELEMENT_BYTES[precision]
    if zero_stage < 3:
        # Stages 0 and 1 reduce once in a step, stage 2 after every microbatch. From 1 on weights are gathered.
        times = accumulation if zero_stage == 2 else 1
        return Traffic(gradient * size.trained * times, 0, parameter * size.trained if zero_stage else 0)
    every = [numel for group in (*size.groups, size.frozen) for numel in group]
    large = sum(numel for numel in every if numel > PERSISTENT_PARAMETER)
    small = sum(numel for numel in every if numel <= PERSISTENT_PARAMETER)
    # Large parameters are made whole once in every microbatch, small ones after the update.
    return Traffic(0, gradient * size.trained * accumulation, parameter * (large * accumulation + small))


@dataclass(frozen=True)
class Reading:
    """What one node reads in one epoch. shards: that it touches, of all."""

    images: int
    bytes: int
    shards: int


def reading(images: int, size: int, shards: int, nodes: int) -> Reading:
    """Means over nodes, with the order `permutation`: each image is read once, on a node that chance chooses."""
    touched = shards * (1 - (1 - 1 / nodes) ** (images / shards)) if nodes > 1 else shards
    return Reading(round(images / nodes), round(size / nodes), round(touched))


@dataclass(frozen=True)
class Duration:
    """hours: of wall time. cost: None without a price."""

    hours: float
    worker_hours: float
    cost: float | None


def duration(steps: int, global_size: int, rate: float, workers: int, price: float | None) -> Duration:
    """rate: images per second of all workers. price: of one worker for an hour."""
    hours = steps * global_size / rate / _HOUR
    return Duration(hours, hours * workers, None if price is None else hours * workers * price)


def images_per_second(text: str, workers: int) -> float:
    """A stated number, of all workers; or a run's metrics.jsonl, whose median per worker is multiplied by `workers`."""
    try:
        stated = float(text)
    except ValueError:
        return _measured(Path(text)) * workers
    if not 0 < stated < float("inf"):
        raise UserError(f"--images-per-second is {text}: expected a number above 0, or a run's metrics.jsonl")
    return stated


def _measured(path: Path) -> float:
    """Images per second of one worker."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rates: Sequence[float] = [line["images_per_second"] / line["world_size"] for line in lines[1:] or lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--images-per-second is '{path}': expected a number, or the metrics.jsonl of a stage ({error})"
        ) from None
    if not rates:
        raise UserError(
            f"--images-per-second is '{path}': the file has no line yet; wait for the first, or say a number"
        )
    return median(rates)
