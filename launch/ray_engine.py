"""Ray Core as the engine: workers are actors, and a stage goes on with others when some are lost or more can be had.

Each set of workers, a generation, has fixed places in the process group. It ends as a whole, and the next one continues
from the newest checkpoint with as many workers as there is room for and the batch divides among.
"""

from __future__ import annotations

import os
import queue
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dino_scale.checkpoint.store import list_checkpoints
from dino_scale.config.schema import LaunchConfig
from dino_scale.errors import ClusterLostError, DinoScaleError
from dino_scale.training.control import Event, MessageEvent
from launch.elastic import Retries, largest_fitting, worker_counts
from launch.engine import Show
from launch.memory_check import require_memory_of
from launch.ray_failures import Lost
from launch.ray_head import Head
from launch.ray_machines import Machines, described
from launch.ray_placement import Placement, Worker
from launch.ray_session import RaySession, import_ray
from launch.ray_watch import Watch
from launch.signals import StopRequest, undisturbed
from launch.worker import StageJob, StageResult

T = TypeVar("T")

_SETTLE_SECONDS = 2.0  # machines often come in groups: grow once, not for each
_PAUSE_SLICE_SECONDS = 0.2
_DISMISS_SECONDS = 5.0
_ROOM_SECONDS = 60.0  # for the workers to say what memory they have
_LAST_SAVE_SECONDS = 30.0  # without a head; after a minute of that Ray ends every process of the cluster


class RayEngine:
    is_primary = True

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        self.workers = launch.worker_range()
        self._session = RaySession(launch)
        self._machines: Machines
        self._head: Head | None = None
        self._watch: Watch | None = None
        self._group: Any = None
        self._team: list[Worker] = []
        self._released: Counter[str] = Counter()  # node -> workers whose processes may not be gone yet
        self._fitting: set[str] = set()  # stages that were found to fit into the workers' memory
        self._more_since: float | None = None  # since when there has been room for more workers

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            lost = self._head is not None and self._head.lost
            if lost:
                self._dismiss_team()
            else:
                self._end_generation()
            if self._head is not None:
                self._head.close()
            self._session.close(lost)

    def on_primary(self, function: Callable[[], T]) -> T:
        return function()

    def run(self, job: StageJob, stop: StopRequest, show: Show) -> StageResult:
        if self._head is None:
            self._session.open(show)
            stop.install_again()
            self._head = self._session.head()
            self._machines = Machines(self.launch)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def show_events() -> None:
            while not events.empty():
                show(events.get())

        try:
            return self._head.attend(lambda: self._supervise(job, stop, events.put), show_events)
        except ClusterLostError as loss:
            error = self._save_without_head(job, str(loss), show)
            show_events()
            raise error from None
        except BaseException as error:
            self._session.keep_logs = not isinstance(error, DinoScaleError | KeyboardInterrupt)
            stop.requested = True  # nothing new is started, whatever raised this
            self._end_generation()  # the others may wait in a collective for ever
            raise

    def _supervise(self, job: StageJob, stop: StopRequest, show: Show) -> StageResult:
        """One generation after the other, until the stage is done, stopped, or cannot go on."""
        counts = worker_counts(job.config.stages[job.stage].batch, self.workers)
        tries = Retries(self.launch.retries)
        while True:
            try:
                result = self._run_generation(job, counts, stop, show)
            except Lost as loss:
                self._session.keep_logs = True
                self._end_generation()
                seconds = tries.pause_after(f"{loss}; Ray's logs: {self._session.logs()}", _newest(job))
                self._pause(seconds, str(loss), stop, show)
                continue
            self._session.keep_logs = False
            if result is not None:
                return result

    def _save_without_head(self, job: StageJob, loss: str, show: Show) -> ClusterLostError:
        """The error to end with, after a last checkpoint where the workers are still there to write one."""
        if self._watch is not None:
            show(MessageEvent(f"{loss}; the workers are asked to save and to end"))
            self._watch.save_and_end(_LAST_SAVE_SECONDS)
        newest = _newest(job)
        kept = f"the newest checkpoint is that of step {_step_of(newest)}" if newest else "there is no checkpoint yet"
        return ClusterLostError(f"{loss}: {kept}; start the cluster again")

    # --- one generation -----------------------------------------------------------------------------------------------

    def _run_generation(self, job: StageJob, counts: list[int], stop: StopRequest, show: Show) -> StageResult | None:
        """The stage's result, or None when it goes on with other workers."""
        if self._team and (len(self._team) not in counts or self._reason_to_move(counts)):
            self._end_generation()
        if not self._team and not self._place_workers(counts, stop, show):
            return StageResult(_step_of(_newest(job)), interrupted=True)
        self._require_memory(job)
        self._more_since = None
        watch = Watch(self._team, self._machines, job, show, self._session.logs())
        self._watch = watch
        result = watch.wait(stop, lambda: self._reason_to_move(counts), 60.0 * self.launch.patience_minutes)
        if not result.interrupted or stop.requested or watch.paused_for is None:
            return result
        show(MessageEvent(f"{job.stage}: saved at step {result.step}, because {watch.paused_for}"))
        if self._session.is_local and self._machines.leaving():
            return result
        self._end_generation()
        return None

    def _place_workers(self, counts: list[int], stop: StopRequest, show: Show) -> bool:
        """False when a stop was requested before all had started."""
        placement = Placement(self.launch, self._machines, lambda: stop.requested, show)
        released, self._released = self._released, Counter()
        self._group = placement.reserve(counts, released)
        team = placement.start(self._group) if self._group is not None else None
        if team is None:
            return False
        self._team = team
        self._session.guard()
        machines = len({worker.machine.node for worker in self._team})
        needs = described(self._machines.needs)
        show(MessageEvent(f"{len(self._team)} worker(s) on {machines} machine(s), {needs} each"))
        if self._session.is_local:
            self._warn_of_crowding(show)
        return True

    def _require_memory(self, job: StageJob) -> None:
        """UserError where a stage cannot fit. Once a stage; on a cluster only the workers know what they have."""
        if self._session.is_local or not self.launch.check_memory or job.stage in self._fitting:
            return
        ray = import_ray()
        rooms = [worker.actor.room.remote(worker.place.local_world) for worker in self._team]
        try:
            found = ray.get(rooms, timeout=_ROOM_SECONDS)
        except ray.exceptions.RayError as error:
            raise Lost(f"a worker was lost before it began ({type(error).__name__})") from None
        require_memory_of(
            job.config, job.stage, {worker.name: room for worker, room in zip(self._team, found, strict=True)}
        )
        self._fitting.add(job.stage)

    def _reason_to_move(self, counts: list[int]) -> str | None:
        """Why the workers should be placed anew: one of their machines is about to go, or there is room for more."""
        places = Counter(worker.machine.node for worker in self._team)
        leaving = self._machines.leaving()
        for worker in self._team:
            if worker.machine.node in leaving:
                return f"machine {worker.machine.address} is about to be taken away"
        if len(self._team) == counts[0]:
            return None
        staying = [machine for machine in self._machines.alive() if machine.node not in leaving]
        if not self._is_larger(largest_fitting(counts, self._machines.room(staying, places))):
            self._more_since = None
            return None
        self._more_since = self._more_since or time.monotonic()
        if time.monotonic() - self._more_since < _SETTLE_SECONDS:
            return None
        usable, _ = self._machines.usable()  # a machine that is cut off looks as if it had room
        count = largest_fitting(counts, self._machines.room(usable, places))
        return f"there is room for {count} workers now" if self._is_larger(count) else None

    def _is_larger(self, count: int | None) -> bool:
        return count is not None and count > len(self._team)

    def _end_generation(self) -> None:
        """Kill the workers and give their places back; nothing is waited for."""
        if not self._session.is_open:
            return
        ray = import_ray()
        if self._team:
            self._released = Counter(worker.machine.node for worker in self._team)
        for worker in self._team:
            ray.kill(worker.actor)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        self._team, self._group, self._watch = [], None, None

    def _dismiss_team(self) -> None:
        """End the workers without the cluster's help."""
        ends = [worker.actor.end.remote() for worker in self._team]
        if ends:  # time to send it; the answers would be that nobody is there any more
            import_ray().wait(ends, num_returns=len(ends), timeout=_DISMISS_SECONDS)
        self._team, self._group, self._watch = [], None, None

    def _pause(self, seconds: float, loss: str, stop: StopRequest, show: Show) -> None:
        later = f" in {seconds:.0f} s" if seconds else ""
        show(MessageEvent(f"{loss}; starting again from the newest checkpoint{later}"))
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop.requested:
            time.sleep(_PAUSE_SLICE_SECONDS)

    def _warn_of_crowding(self, show: Show) -> None:
        cores, threads = os.cpu_count() or 1, max(1, self.launch.threads)
        if len(self._team) * threads > cores:
            show(MessageEvent(f"{len(self._team)} workers x {threads} threads share {cores} CPU core(s)"))


def _newest(job: StageJob) -> str | None:
    """Name of the stage's newest checkpoint, whole or not."""
    folders = list_checkpoints(Path(job.run_dir) / job.stage / "checkpoints")
    return folders[-1].name if folders else None


def _step_of(checkpoint: str | None) -> int:
    return int(checkpoint.rpartition("_")[2]) if checkpoint else 0
