"""Bytes that one worker needs, by ZeRO stage: the state that stays, and what a step adds to it.

The layout is that of DeepSpeed 0.19.8 as `dino_scale/training/zero.py` sets it up; tests/launch/test_plan_memory.py
counts the tensors of real engines against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dino_scale.config.schema import ModelConfig, OptimizerConfig
from dino_scale.errors import ConfigError
from dino_scale.model.dino import Dino, build_model
from dino_scale.precision import BF16_PARAMETERS
from dino_scale.training.optimizer import parameter_groups
from dino_scale.training.zero import PERSISTENT_PARAMETER, REDUCE_BUCKET

_FLOAT_BYTES = 4
# Bytes of one element of (parameters, gradients) by precision; masters and moments are float32. bf16 is autocast.
ELEMENT_BYTES = {"fp32": (4, 4), "bf16": (4, 4), BF16_PARAMETERS: (2, 4)}
_ALIGNMENT = 2  # elements; DeepSpeed pads every group of parameters to a multiple of this times the workers
# While the optimizer updates: gradients once more in one piece, and two intermediate results of AdamW.
_UPDATE_COPIES = 3


@dataclass(frozen=True)
class ModelSize:
    """groups: elements of every trained parameter, by parameter group. frozen: of every frozen one. buffers: bytes."""

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    buffers: int

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def parameters(self) -> int:
        return self.trained + sum(self.frozen)


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds.

    parameters (with buffers), optimizer (masters and moments) and average stay from step to step; gradients while a
    step accumulates them. During forward and backward there are also `activations`, in stage 3 the `gathered` whole
    parameters, and the `bucket` in which gradients travel; they are gone when the optimizer needs `update`.
    """

    zero_stage: int
    parameters: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    bucket: int
    update: int
    activations: int = 0

    @property
    def state(self) -> int:
        """What stays from step to step; in stage 3 the gradients' place too."""
        return self.parameters + self.optimizer + self.average + (self.gradients if self.zero_stage == 3 else 0)

    @property
    def total(self) -> int:
        """The most at any moment of a step."""
        gradients = 0 if self.zero_stage == 3 else self.gradients
        return self.state + gradients + max(self.activations + self.gathered + self.bucket, self.update)

    def with_activations(self, activations: int) -> Memory:
        return replace(self, activations=activations)


@dataclass(frozen=True)
class Choice:
    """A stage and a microbatch that fit, and what they need."""

    zero_stage: int
    microbatch: int
    memory: Memory


def model_size(config: ModelConfig, classes: int, optimizer: OptimizerConfig) -> ModelSize:
    """Counted on a model without storage."""
    model = without_storage(config, classes)
    groups = tuple(tuple(p.numel() for _, p in group.parameters) for group in parameter_groups(model, optimizer))
    frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
    return ModelSize(groups, frozen, sum(buffer.nbytes for buffer in model.buffers()))


def without_storage(config: ModelConfig, classes: int) -> Dino:
    with torch.device("meta"):
        return build_model(config, classes, pretrained=False)


def memory(
    size: ModelSize, zero_stage: int, workers: int, average: bool, precision: str = "bf16", device: str = "cuda"
) -> Memory:
    """Without activations. Stage 0 keeps everything whole and needs no master copy; from stage 1 on masters and moments
    are split among the workers, from 2 on gradients too, in 3 parameters. device: "cpu" touches of the bucket only what
    it fills."""
    if precision not in ELEMENT_BYTES:
        raise ConfigError(f"the plan does not know the precision '{precision}': expected {', '.join(ELEMENT_BYTES)}")
    parameter_bytes, gradient_bytes = ELEMENT_BYTES[precision]
    own = _own_share(size, zero_stage, workers)
    whole = size.trained if zero_stage in (0, 3) else own * workers  # stages 1 and 2 pad the whole as well
    masters = 2 if zero_stage == 0 else 3
    bucket = REDUCE_BUCKET if device == "cuda" else min(REDUCE_BUCKET, size.trained)
    return Memory(
        zero_stage,
        parameters=parameter_bytes * _kept_parameters(size, zero_stage, workers, whole) + size.buffers,
        gradients=gradient_bytes * (own if zero_stage >= 2 else size.trained),
        optimizer=_FLOAT_BYTES * masters * own,
        average=_FLOAT_BYTES * own if average else 0,
        gathered=parameter_bytes * size.parameters if zero_stage == 3 and workers > 1 else 0,
        bucket=gradient_bytes * bucket if zero_stage > 0 else 0,
        update=_FLOAT_BYTES * _UPDATE_COPIES * own,
    )


def _own_share(size: ModelSize, zero_stage: int, workers: int) -> int:
    """Elements of the trained parameters whose masters and moments one worker holds."""
    if zero_stage == 0:
        return size.trained
    if zero_stage == 3:
        return sum(_divided(numel, workers) for group in size.groups for numel in group)
    return sum(_divided(sum(group), _ALIGNMENT * workers) * _ALIGNMENT for group in size.groups)


def _kept_parameters(size: ModelSize, zero_stage: int, workers: int, whole: int) -> int:
    """Elements. Stage 3 splits every parameter, and keeps small ones whole as well once they were used."""
    if zero_stage < 3 or workers == 1:
        return whole + sum(size.frozen)
    every = [numel for group in (*size.groups, size.frozen) for numel in group]
    small = sum(numel for numel in every if numel <= PERSISTENT_PARAMETER)
    return sum(_divided(numel, workers) for numel in every) + small


def recommend(
    limit: int, microbatches: Sequence[int], need: Callable[[int, int], Memory], sent: Callable[[int, int], int]
) -> Choice | None:
    """The largest microbatch that fits into `limit` bytes, in the stage that sends least; None: nothing fits.

    need, sent: memory, and bytes sent in a step, of (stage, microbatch).
    """
    for microbatch in sorted(microbatches, reverse=True):
        fitting = [stage for stage in range(4) if need(stage, microbatch).total <= limit]
        if fitting:
            best = min(fitting, key=lambda stage: (sent(stage, microbatch), stage))
            return Choice(best, microbatch, need(best, microbatch))
    return None


def _divided(value: int, parts: int) -> int:
    return -(-value // parts)
