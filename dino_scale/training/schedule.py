"""Length of a stage and its learning-rate curve, both pure functions of the configuration and the step."""

from __future__ import annotations

import math

from dino_scale.config.schema import ScheduleConfig


def total_steps(schedule: ScheduleConfig, samples: int, global_size: int) -> int:
    """Optimizer steps of a stage over `samples` training images in global batches of `global_size`."""
    if schedule.steps > 0:
        return schedule.steps
    return max(1, math.ceil(schedule.epochs * samples / global_size))


def rate_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """What every learning rate is multiplied by in optimizer step `step` (counted from 0) of `total`."""
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.decay == "step":
        drops = sum(step >= round(share * total) for share in schedule.drop_at)
        return schedule.drop_factor**drops
    progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return schedule.final_factor + (1 - schedule.final_factor) * cosine
