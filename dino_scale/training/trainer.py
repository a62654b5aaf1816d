"""The training loop of one stage, told as steps: count boxes, deal gradients, update, log, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dino_scale.checkpoint.manifest import Best
from dino_scale.config.schema import StageConfig
from dino_scale.errors import DataError, NonFiniteError
from dino_scale.structures import Batch
from dino_scale.training import distributed
from dino_scale.training.control import Control, MessageEvent, StepEvent
from dino_scale.training.determinism import seed_microbatch
from dino_scale.training.ema import WeightAverage
from dino_scale.training.metrics import MetricsLog, Stopwatch, memory_megabytes
from dino_scale.training.own_time import OwnTime
from dino_scale.training.sample_log import SampleLog
from dino_scale.training.schedule import rate_factor
from dino_scale.training.zero import StepOutcome, ZeroEngine


@dataclass(frozen=True)
class StageLength:
    """How long a stage is. samples: images of the training set; steps: optimizer steps of the whole stage."""

    samples: int
    steps: int
    global_size: int

    def epoch(self, step: int) -> float:
        return step * self.global_size / self.samples


@dataclass
class Progress:
    """Where a stage stands. step: optimizer steps done, skipped ones included; skipped: those that were not finite."""

    step: int = 0
    skipped: int = 0
    best: Best | None = None  # of the evaluations so far


class Checkpoints(Protocol):
    """Where the trainer puts checkpoints; as `checkpoint.saver.Saver`, in terms of a stage's progress."""

    def save(self, progress: Progress, required: bool = False) -> None:
        """Copy the state and write it while training goes on; `required`: if that fails the run cannot go on."""

    def failed(self) -> bool:
        """Whether this rank has failed to write; the others need not know yet."""

    def settle(self) -> None:
        """Wait for what is being written, and say or raise what went wrong."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step. boxes: of the global batch, at least 1. The rest: any rank wants it."""

    boxes: float
    stop: bool
    save: bool
    settle: bool


class Trainer:
    """Drives an engine through the steps of a stage; the same on every rank."""

    def __init__(
        self,
        name: str,
        config: StageConfig,
        seed: int,
        length: StageLength,
        engine: ZeroEngine,
        average: WeightAverage | None,
        log: MetricsLog,
        control: Control,
        checkpoints: Checkpoints,
        evaluate: Callable[[Progress], None],
        samples: SampleLog | None = None,
    ) -> None:
        """`checkpoints` and `evaluate` are called on every rank, at the steps that the configuration names."""
        self.name, self.config, self.seed, self.length = name, config, seed, length
        self.engine, self.average, self.log, self.control = engine, average, log, control
        self.checkpoints, self.evaluate, self.samples = checkpoints, evaluate, samples
        self.device = distributed.device()
        self.watch = Stopwatch()
        self.last_save = time.monotonic()
        self.own_time = OwnTime(self.device)
        self.timed_steps = 0
        self.agreed_steps = 0  # since this process began, like `replaced`
        self.replaced = 0  # images that stood in for unreadable ones, on all ranks
        self.window: list[dict[str, Tensor]] = []

    def run(self, steps: Iterable[list[Batch]], progress: Progress) -> bool:
        """Train until `steps` ends; True when stopped early on request (a checkpoint has then been written)."""
        source = iter(steps)
        self._restart_watch()
        for microbatches in self._timed(source):
            agreed = self._agree(microbatches)
            self._require_few_replaced(progress.step)
            if agreed.settle:
                self.checkpoints.settle()
            if agreed.stop:
                self.checkpoints.save(progress, required=True)
                self.checkpoints.settle()
                return True
            if agreed.save:
                self._save(progress)
            outcome = self._step(microbatches, agreed.boxes, progress.step)
            progress.step += 1
            self.timed_steps += 1
            self._account(outcome, progress)
            self.control.beat(progress.step, self.own_time.take())
            self._log_when_due(outcome, progress)
            self._pause_when_due(progress)
        return False

    def _timed(self, source: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The items of `source`; the time spent waiting for them goes to the stopwatch."""
        while True:
            begin = time.perf_counter()
            item = next(source, None)
            waited = time.perf_counter() - begin
            self.watch.add_wait(waited)
            self.own_time.add(waited)
            if item is None:
                return
            yield item

    def _agree(self, microbatches: list[Batch]) -> Agreement:
        """What must be the same on all ranks, in one collective. Of the clocks, that of rank 0 counts."""
        boxes = sum(sum(batch.targets.counts) for batch in microbatches)
        replaced = sum(batch.replaced for batch in microbatches)
        save = self.control.save_requested() or (distributed.rank() == 0 and self._minutes_are_over())
        own = [boxes, replaced, self.control.stop_requested(), save, self.checkpoints.failed()]
        shared = distributed.sum_over_ranks(torch.tensor([float(value) for value in own])).tolist()
        self.replaced += int(shared[1])
        self.agreed_steps += 1
        return Agreement(max(1.0, shared[0]), *(value > 0 for value in shared[2:]))

    def _minutes_are_over(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes

    def _save(self, progress: Progress) -> None:
        self.last_save = time.monotonic()
        self.checkpoints.save(progress)

    def _require_few_replaced(self, step: int) -> None:
        """The same on every rank, whatever their number: all count the replacements of all."""
        seen = max(self.length.samples, self.agreed_steps * self.length.global_size)
        if self.replaced > self.config.data.bad_share * seen:
            raise DataError(
                f"stage {self.name}, step {step}: {self.replaced} image(s) could not be read and were replaced, more "
                f"than data.bad_share ({self.config.data.bad_share}) of {seen} allows: see bad_samples.jsonl in the "
                "stage's folder, then restore the shards or pack the dataset anew"
            )

    def _step(self, microbatches: list[Batch], box_count: float, step: int) -> StepOutcome:
        """One optimizer step. The loss of every microbatch is scaled so that DeepSpeed's means add up to a sum."""
        self.engine.set_rate_factor(rate_factor(self.config.schedule, step, self.length.steps))
        first = distributed.rank() * len(microbatches)
        scale = len(microbatches) * distributed.world_size()
        outcome = None
        if self.samples is not None:
            self.samples.write(step + 1, first, microbatches)
        for number, batch in enumerate(microbatches, start=first):
            generator = seed_microbatch(self.seed, step, number)
            with self.own_time.measured():
                loss, parts = self.engine(batch.to(self.device), box_count, generator)
            self.engine.backward(loss * scale)
            outcome = self.engine.step()
            self.window.append(parts)
        assert outcome is not None, "the engine's accumulation does not match the loader's"
        return outcome

    def _account(self, outcome: StepOutcome, progress: Progress) -> None:
        if outcome.applied:
            if self.average is not None:
                self.average.update()
            return
        progress.skipped += 1
        self._say(f"step {progress.step}: gradient not finite, step left out ({progress.skipped} so far)")
        if progress.skipped > self.config.non_finite_limit:
            raise NonFiniteError(
                f"stage {self.name}, step {progress.step}: {progress.skipped} steps had a gradient that is not finite, "
                f"non_finite_limit is {self.config.non_finite_limit}: lower the learning rate or look at the data"
            )

    def _log_when_due(self, outcome: StepOutcome, progress: Progress) -> None:
        last = progress.step == self.length.steps
        if progress.step % self.config.log_every_steps and not last:
            return
        losses = self._window_means()
        if distributed.rank() == 0:
            self._write(outcome, progress, losses)
        self._restart_watch()

    def _restart_watch(self) -> None:
        self.watch.restart()
        self.timed_steps = 0

    def _window_means(self) -> dict[str, float]:
        """Mean over the steps since the last log of every loss part, summed over microbatches and ranks."""
        names = sorted(self.window[0])
        sums = torch.stack([torch.stack([parts[name].float() for name in names]) for parts in self.window]).sum(0)
        steps = len(self.window) * distributed.world_size() * self.config.batch.microbatch / self.length.global_size
        self.window.clear()
        means = distributed.sum_over_ranks(sums.cpu()) / steps
        return dict(zip(names, means.tolist(), strict=True))

    def _write(self, outcome: StepOutcome, progress: Progress, losses: dict[str, float]) -> None:
        rate = self.timed_steps * self.length.global_size / max(self.watch.seconds(), 1e-9)
        left = (self.length.steps - progress.step) * self.length.global_size / rate
        total = losses.pop("total")
        line: dict[str, Any] = {
            "step": progress.step,
            "epoch": self.length.epoch(progress.step),
            "samples_seen": progress.step * self.length.global_size,
            "loss": total,
            "losses": losses,
            "gradient_norm": outcome.gradient_norm if outcome.applied else None,
            "skipped_steps": progress.skipped,
            "replaced_samples": self.replaced,
            "learning_rates": self.engine.learning_rates(),
            "images_per_second": rate,
            "data_wait_share": self.watch.wait_share(),
            "memory_mb": memory_megabytes(),
            "world_size": distributed.world_size(),
            "time": time.time(),
        }
        self.log.write(line)
        self.control.report(StepEvent(self.name, progress.step, self.length.steps, line["epoch"], total, rate, left))

    def _pause_when_due(self, progress: Progress) -> None:
        """Save and evaluate at their intervals; the last step is left to the caller, who does both anyway."""
        if progress.step >= self.length.steps:
            return
        if _due(progress.step, self.config.checkpoint.every_steps):
            self._save(progress)
        if _due(progress.step, self.config.evaluation.every_steps):
            self.evaluate(progress)
            self._restart_watch()

    def _say(self, text: str) -> None:
        if distributed.rank() == 0:
            self.control.report(MessageEvent(f"{self.name}: {text}"))


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
