"""Memory and traffic of a stage of a chain, for any ZeRO stage and microbatch."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from data_pipeline.loader import PREFETCH
from dino_scale.config.schema import ChainConfig, StageConfig
from launch.plan import largest_image
from launch.plan_activations import Activations, Microbatch, measure_activations
from launch.plan_cost import Traffic, traffic
from launch.plan_memory import Memory, ModelSize, memory, model_size

# Resident memory of a worker that has imported everything and holds nothing yet, and of one more loader process beside
# the first, whose imports they share (measured with torch 2.13 for CPUs).
PROCESS_BYTES = 550 * 10**6
LOADER_BYTES = 150 * 10**6

Measured = dict[tuple[object, ...], Activations]


class StageNeeds:
    """What one worker of a stage needs. device: "cpu" or "cuda". image: padded size in place of the largest one.

    measured: remembers activations; stages that are alike in what decides them share it.
    """

    def __init__(
        self,
        config: ChainConfig,
        stage: str,
        classes: int,
        workers: int,
        device: str,
        measured: Measured,
        image: tuple[int, int] | None = None,
    ) -> None:
        self.config, self.classes, self.workers, self.device = config, classes, workers, device
        self.stage: StageConfig = config.stages[stage]
        self.measured, self.image = measured, image

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.config.model, self.classes, self.stage.optimizer)

    def memory(self, zero_stage: int, microbatch: int, recompute: bool | None = None) -> Memory:
        """recompute: in place of model.backbone.checkpoint_activations."""
        stage = self.stage
        kept = memory(self.size, zero_stage, self.workers, stage.ema_decay > 0, stage.precision, self.device)
        return kept.with_activations(self.activations(microbatch, recompute).peak)

    def activations(self, microbatch: int, recompute: bool | None = None) -> Activations:
        model = self.config.model
        if recompute is not None:
            model = replace(model, backbone=replace(model.backbone, checkpoint_activations=recompute))
        shape = Microbatch(microbatch, self.largest(microbatch))
        key = (repr(model), self.classes, repr(self.stage.loss), self.stage.precision, shape, self.device)
        if key not in self.measured:
            self.measured[key] = measure_activations(
                model, self.classes, self.stage.loss, self.stage.precision, shape, self.device
            )
        return self.measured[key]

    def largest(self, microbatch: int) -> tuple[int, int]:
        return self.image or largest_image(self.stage, microbatch)

    def traffic(self, zero_stage: int, microbatch: int) -> Traffic:
        accumulation = self.stage.batch.global_size // (microbatch * self.workers)
        return traffic(self.size, zero_stage, self.workers, accumulation, self.stage.precision)

    def sent(self, zero_stage: int, microbatch: int) -> int:
        return self.traffic(zero_stage, microbatch).sent(self.workers)

    def host(self, microbatch: int) -> int:
        """Bytes of host memory: the process with its libraries, its loader processes, and the batches read ahead."""
        height, width = self.largest(microbatch)
        batch = 3 * height * width * microbatch
        loaders = self.stage.data.loader_workers
        return PROCESS_BYTES + loaders * (LOADER_BYTES + PREFETCH * batch)
