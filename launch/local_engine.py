"""One worker, in this process, without Ray: for a single accelerator, a debugger, a test."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from dino_scale.config.schema import WorkerRange
from dino_scale.training import distributed
from launch.engine import Show, StageControl
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult, run_stage

T = TypeVar("T")


class LocalEngine:
    is_primary = True
    workers = WorkerRange(1, 1)

    def __enter__(self) -> LocalEngine:
        distributed.join(0, 1, 0, 1, "127.0.0.1", free_port())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        distributed.leave()

    def on_primary(self, function: Callable[[], T]) -> T:
        return function()

    def run(self, job: StageJob, stop: StopRequest, show: Show) -> StageResult:
        return run_stage(job, StageControl(stop, show))


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
