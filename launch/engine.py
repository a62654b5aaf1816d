"""What an engine is: the way in which training processes come to be. Three exist, and all run the same worker."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from dino_scale.config.schema import WorkerRange
from dino_scale.training.control import Event
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult

T = TypeVar("T")
Show = Callable[[Event], None]


class Engine(Protocol):
    """A context in which stages can be run. Between stages the training processes stay."""

    workers: WorkerRange  # how many training processes there may be
    is_primary: bool  # True in the one process that writes the chain's state and talks to the user

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def on_primary(self, function: Callable[[], T]) -> T:
        """Run `function` in the primary process and return its result, or raise its error, in all of them."""

    def run(self, job: StageJob, stop: StopRequest, show: Show) -> StageResult:
        """One stage on all workers. Errors of our family keep their class; a dead worker is a WorkerLostError."""


class StageControl:
    """The worker's line to a driver that lives in the same process."""

    def __init__(self, stop: StopRequest, show: Show) -> None:
        self._stop = stop
        self._show = show

    def report(self, event: Event) -> None:
        self._show(event)

    def beat(self, step: int, own_seconds: float | None = None) -> None:
        """Nobody waits for a sign of life: the driver is this process."""

    def stop_requested(self) -> bool:
        return self._stop.requested

    def save_requested(self) -> bool:
        return self._stop.take_save_request()
