"""Workers that somebody else has started: torchrun, srun, a cluster's own launcher. Each runs the same command.

    torchrun --nproc-per-node 2 -m launch train CHAIN.yaml --set launch.engine=torchrun

Rank 0 alone writes the chain's state and the report; what comes next it tells the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from dino_scale.config.schema import WorkerRange
from dino_scale.errors import UserError
from dino_scale.training import distributed
from launch.engine import Show, StageControl
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult, run_stage

T = TypeVar("T")


class TorchrunEngine:
    def __init__(self) -> None:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and, if set, LOCAL_WORLD_SIZE."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(
                f"launch.engine is torchrun, but {', '.join(missing)} is not set: start the command with torchrun "
                "or srun, or use --set launch.engine=local"
            )
        self.rank, self.world, self.local_rank = (_number(name) for name in names[:3])
        self.workers = WorkerRange(self.world, self.world)
        self.local_world = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 1
        self.address, self.port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
        self.is_primary = self.rank == 0

    def __enter__(self) -> TorchrunEngine:
        distributed.join(self.rank, self.world, self.local_rank, self.local_world, self.address, self.port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        distributed.leave()

    def on_primary(self, function: Callable[[], T]) -> T:
        return distributed.on_rank_zero(function)

    def run(self, job: StageJob, stop: StopRequest, show: Show) -> StageResult:
        return run_stage(job, StageControl(stop, show))


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise UserError(f"the environment variable {name} is '{text}': expected a whole number")
    return int(text)
