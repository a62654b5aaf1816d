"""A training process that a driver elsewhere controls: joins the group, runs stages, hands over events when asked."""

from __future__ import annotations

import os
import queue
import socket
import threading
from dataclasses import dataclass

from dino_scale.training.control import Event
from launch.worker import StageJob, StageResult, run_stage


@dataclass(frozen=True)
class Place:
    """A worker's seat in the process group. address, port: where rank 0 listens."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int


class WorkerProcess:
    """Methods may run at the same time in different threads: `run` in one, the short ones beside it."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._save = threading.Event()

    def process_id(self) -> int:
        return os.getpid()

    def free_port(self, address: str) -> int:
        """A TCP port of this host that was free a moment ago."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            return int(probe.getsockname()[1])

    def run(self, job: StageJob, place: Place) -> StageResult:
        """One stage. The process group is joined with the first one and kept."""
        import torch.distributed

        from dino_scale.training import distributed

        if not torch.distributed.is_initialized():
            distributed.join(place.rank, place.world, place.local_rank, place.local_world, place.address, place.port)
        try:
            return run_stage(job, self)
        finally:
            self._stop.clear()
            self._save.clear()

    def request_stop(self) -> None:
        self._stop.set()

    def request_save(self) -> None:
        """Save at the next step and go on; one rank is enough, the ranks agree."""
        self._save.set()

    def take_events(self) -> list[Event]:
        """Events reported since the last call."""
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    # Control, for the worker function

    def report(self, event: Event) -> None:
        self._events.put(event)

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def save_requested(self) -> bool:
        requested = self._save.is_set()
        self._save.clear()
        return requested
