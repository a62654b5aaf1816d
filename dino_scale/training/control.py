"""What a training worker tells its driver, and what the driver may ask of it.

The same worker runs under every engine; an engine hands it one `Control` and shows the events as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class StepEvent:
    """One logged optimizer step."""

    stage: str
    step: int  # optimizer steps done in this stage
    total_steps: int
    epoch: float  # passes over the training set so far
    loss: float
    images_per_second: float  # over all workers, since the last event
    seconds_left: float  # estimate for the rest of the stage


@dataclass(frozen=True)
class EvaluationEvent:
    """COCO numbers of the weights after `step`."""

    stage: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MessageEvent:
    """One line for the person who watches."""

    text: str


Event = StepEvent | EvaluationEvent | MessageEvent


class Control(Protocol):
    """The worker's line to its driver."""

    def report(self, event: Event) -> None:
        """Hand over an event; called on rank 0 only, must not block for long."""

    def beat(self, step: int, own_seconds: float | None = None) -> None:
        """A sign of life, on every rank after every step, and now and then in evaluations.

        own_seconds: of a step, what this rank spent in it without waiting for others.
        """

    def stop_requested(self) -> bool:
        """True once the worker should save and return; ranks may hear of it at different times and agree themselves."""

    def save_requested(self) -> bool:
        """True while a request to save and go on is not served; to ask is to serve it, so ask once per step."""
