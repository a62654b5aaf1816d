"""Watching workers while they run a stage: events, heartbeats, requests to pause, and what went wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from dino_scale.errors import WorkerMemoryError
from dino_scale.training.control import MessageEvent
from launch.advice import against_memory
from launch.engine import Show
from launch.heartbeat import Heartbeats
from launch.memory_events import out_of_memory_kills
from launch.ray_failures import PATIENCE, Lost, cause_among, error_of, in_a_line
from launch.ray_machines import Machine, Machines
from launch.ray_placement import Worker
from launch.ray_session import import_ray
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult

_POLL_SECONDS = 0.2
_PULSE_SHARE = 0.005  # seconds per worker and question: 512 workers are asked every 2.6 s
_WISH_SECONDS = 1.0  # between two looks at the cluster
_UNANSWERED_SECONDS = 3.0  # a pulse that takes longer raises the question whether the machine can be reached at all
_FAILED_PROBES = 2  # in a row, until a machine counts as lost
_LAST_EVENTS_SECONDS, _LAST_EVENTS_OF_LOST_SECONDS = 10.0, 1.0
_TELL_SECONDS = 5.0  # for a machine to tell how many processes it has killed for memory


class Watch:
    """One stage on one set of workers. paused_for: why they were asked to save and return, if not by the user."""

    def __init__(self, workers: Sequence[Worker], machines: Machines, job: StageJob, show: Show, logs: str) -> None:
        """logs: where Ray's own logs are, in words."""
        self.paused_for: str | None = None
        self._workers, self._machines, self._job, self._show, self._logs = workers, machines, job, show, logs
        self._runs = [
            worker.actor.run.options(concurrency_group="work").remote(job, worker.place) for worker in workers
        ]
        addresses = [worker.machine.address for worker in workers]
        self._hearts = Heartbeats([worker.name for worker in workers], addresses, time.monotonic())
        self._pulses: dict[int, tuple[Any, float]] = {}  # rank -> (answer under way, asked when)
        self._pulse_seconds = len(workers) * _PULSE_SHARE  # between two questions to one worker
        self._unreachable: dict[str, int] = {}  # node -> probes in a row that failed
        self._stopping = False
        self._next_wish = time.monotonic()

    def wait(self, stop: StopRequest, wish: Callable[[], str | None], patience: float) -> StageResult:
        """The result of rank 0 when all have ended. Raises Lost when other workers may succeed where these did not,
        otherwise the error of the worker that is the cause.

        wish: asked about once a second; a reason in words makes the workers save and return. patience: seconds that
        they may go without a step.
        """
        ray = import_ray()
        pending, last_words = list(self._runs), _LAST_EVENTS_SECONDS
        try:
            while pending:
                done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_SECONDS)
                if any(error_of(run) is not None for run in done):
                    raise self._explanation()
                self._take_pulses()
                self._require_life(patience)
                self._pass_on_requests(stop, wish)
        except Lost:
            last_words = _LAST_EVENTS_OF_LOST_SECONDS
            raise
        finally:
            self._take_last_events(last_words)
        result: StageResult = ray.get(self._runs[0])
        return result

    def save_and_end(self, seconds: float) -> None:
        """Have all workers save and return, and wait so long for it, unless one of them fails.

        For the end of a run whose cluster has lost its head: nobody but the workers themselves is asked.
        """
        ray = import_ray()
        for worker in self._workers:
            worker.actor.request_stop.remote()
        deadline, pending = time.monotonic() + seconds, list(self._runs)
        while pending and time.monotonic() < deadline:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_SECONDS)
            if any(error_of(run) is not None for run in done):
                return
        self._take_last_events(_LAST_EVENTS_OF_LOST_SECONDS)

    # --- heartbeats ---------------------------------------------------------------------------------------------------

    def _take_pulses(self) -> None:
        """Note the answers that have come, and ask those workers again."""
        now = time.monotonic()
        for rank, worker in enumerate(self._workers):
            call, asked = self._pulses.get(rank, (None, -math.inf))
            if call is not None and self._note_answer(rank, call):
                self._pulses[rank] = (call := None, asked)
            if call is None and now - asked >= self._pulse_seconds:
                self._pulses[rank] = (worker.actor.pulse.remote(), now)
        for line in self._hearts.remarks(now):
            self._show(MessageEvent(line))

    def _note_answer(self, rank: int, call: Any, seconds: float = 0.0) -> bool:
        """Whether the answer has come (within `seconds`). A worker that is gone is noticed by its run."""
        ray = import_ray()
        if not ray.wait([call], timeout=seconds)[0]:
            return False
        try:
            pulse = ray.get(call)
        except ray.exceptions.RayError:
            return False
        self._hearts.note(rank, pulse, time.monotonic())
        for event in pulse.events:
            self._show(event)
        if pulse.notice:
            self._machines.give_notice(self._workers[rank].machine.node)
        return True

    def _take_last_events(self, seconds: float) -> None:
        """Of rank 0: what is under way first, then the rest."""
        call, _ = self._pulses.pop(0, (None, 0.0))
        if call is not None and not self._note_answer(0, call, seconds):
            return
        self._note_answer(0, self._workers[0].actor.pulse.remote(), seconds)

    def _require_life(self, patience: float) -> None:
        now = time.monotonic()
        hung = self._hearts.hung(patience, now)
        if hung is not None:
            raise Lost(hung)
        late = {
            self._workers[rank].machine.node: self._workers[rank]
            for rank, (call, asked) in self._pulses.items()
            if call is not None and now - asked > _UNANSWERED_SECONDS
        }
        for node, worker in late.items():
            failed = 0 if worker.machine.answers() else self._unreachable.get(node, 0) + 1
            self._unreachable[node] = failed
            if failed >= _FAILED_PROBES:
                raise Lost(f"{worker.name} cannot be reached")

    # --- requests -----------------------------------------------------------------------------------------------------

    def _pass_on_requests(self, stop: StopRequest, wish: Callable[[], str | None]) -> None:
        if stop.take_save_request():
            self._workers[0].actor.request_save.remote()
        if self._stopping:
            return
        if not stop.requested and time.monotonic() >= self._next_wish:
            self.paused_for = wish()
            self._next_wish = time.monotonic() + _WISH_SECONDS
        if stop.requested or self.paused_for:
            self._stopping = True
            for worker in self._workers:
                worker.actor.request_stop.remote()

    # --- what went wrong ----------------------------------------------------------------------------------------------

    def _explanation(self) -> Exception:
        """The one error to raise when at least one worker has failed; waits a little for a better one."""
        ray = import_ray()
        began = time.monotonic()
        while True:
            errors = {rank: error for rank, run in enumerate(self._runs) if (error := error_of(run)) is not None}
            rank, kind = cause_among(errors)
            if time.monotonic() - began >= PATIENCE.get(kind, 0.0):
                break
            ray.wait(self._runs, num_returns=len(self._runs), timeout=_POLL_SECONDS)
        worker, error = self._workers[rank], errors[rank]
        if kind in ("ours", "file"):
            return error
        if kind == "memory" or (kind == "death" and self._was_killed_for_memory(worker)):
            return WorkerMemoryError(f"{worker.name} ran out of memory: {against_memory(self._job)}")
        if kind == "bug":
            return RuntimeError(f"{worker.name} failed; Ray's logs: {self._logs}\n{error}")
        if kind == "death":
            return Lost(f"{worker.name} died (killed, crashed, or its machine was lost)")
        return Lost(f"{worker.name} failed ({in_a_line(error)})")

    def _was_killed_for_memory(self, worker: Worker) -> bool:
        """Whether the kernel has killed for memory on that machine since the worker began, as far as can be known."""
        return worker.machine.answers() and _kills_on(worker.machine) > worker.kills


def _kills_on(machine: Machine) -> int:
    ray = import_ray()
    if machine.node == ray.get_runtime_context().get_node_id():
        return out_of_memory_kills()
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine.node, soft=False)
    count = ray.remote(num_cpus=0, scheduling_strategy=pinned)(out_of_memory_kills)
    try:
        return int(ray.get(count.remote(), timeout=_TELL_SECONDS))
    except ray.exceptions.RayError:
        return 0
