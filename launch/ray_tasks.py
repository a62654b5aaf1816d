"""Packing on a cluster: each piece of work is a Ray task, and the results come in order.

A task whose process or machine is lost is given to another one. What a task raises ends the whole; shards that were
finished by then stay, and the next call takes them over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from dino_scale.config.schema import LaunchConfig
from dino_scale.errors import DinoScaleError, UserError, WorkerLostError
from launch.engine import Show
from launch.ray_session import RaySession, import_ray
from launch.signals import undisturbed

Task = TypeVar("Task")
Result = TypeVar("Result")

RETRIES = 3  # of a task whose process was lost
_QUEUED = 2  # tasks in flight per CPU of the cluster, so that none waits for the driver


class RayTasks:
    """A `data_pipeline.tasks.Runner` while it is entered. address: `local`, `auto` or host:port, as for training.

    workers: tasks at once; None: as many as the cluster has CPUs.
    """

    def __init__(self, address: str, workers: int | None, show: Show) -> None:
        if workers is not None and workers < 1:
            raise UserError(f"--workers is {workers}: expected 1 or more tasks at once")
        self._session = RaySession(LaunchConfig(engine="ray", workers=workers or 1, address=address))
        self._workers, self._show = workers, show

    def __enter__(self) -> RayTasks:
        try:
            self._session.open(self._show)
            self._session.guard()
        except BaseException:
            self._session.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            self._session.close()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """As `Runner.map`; function: importable by its name on every machine."""
        ray = import_ray()
        at_once = self._workers or _QUEUED * max(1, int(ray.cluster_resources().get("CPU", 1)))
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(remote.remote(function, task))
                if len(waiting) >= at_once:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for run in waiting:
                ray.cancel(run, force=True)


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    """What a Ray task runs; Ray takes plain functions only, no partial or built-in ones."""
    return function(task)


def _result(run: Any) -> Any:
    """What a task returned. Raises what it raised where that is ours, WorkerLostError where it was lost too often."""
    ray = import_ray()
    try:
        return ray.get(run)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DinoScaleError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        cause = "out of memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else "killed, or its machine lost"
        raise WorkerLostError(
            f"a packing task was lost {RETRIES + 1} times ({cause}): run the same command again, it goes on where it "
            "stopped; fewer --workers need less memory"
        ) from None
