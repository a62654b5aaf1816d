"""A training process that a driver elsewhere controls: joins the group, runs stages, tells how it fares when asked."""

from __future__ import annotations

import os
import queue
import socket
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dino_scale.training.control import Event
from launch.heartbeat import Pulse
from launch.memory_events import out_of_memory_kills
from launch.network import interface_of
from launch.worker import StageJob, StageResult, run_stage

if TYPE_CHECKING:
    from launch.memory_check import Room

_REMEMBERED_STEPS, _ENOUGH_STEPS = 9, 5
_ABANDONED = "dino-scale: no driver has asked for this worker for {:.0f} s, so it ends\n"


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

    def __init__(self, address: str, notice_file: str = "", lease_seconds: float = 0.0) -> None:
        """address: of this machine, by which the other workers reach it.

        lease_seconds: a stage whose driver asks for no pulse for so long ends with this process; 0: never. Otherwise a
        machine that was cut off from the driver would go on writing to the run folder beside its successors.
        """
        self._notice_file, self._lease = notice_file, lease_seconds
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._save = threading.Event()
        self._asked = self._advanced = time.monotonic()
        self._step: int | None = None
        self._own: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        if interface := interface_of(address):  # otherwise the libraries look the host's name up, and may find another
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)

    def prepare(self) -> tuple[int, int]:
        """Import what takes long, on all machines at once; the process id and the out-of-memory kills so far."""
        from dino_scale.training.zero import load_deepspeed

        load_deepspeed()
        return os.getpid(), out_of_memory_kills()

    def room(self, workers_here: int) -> Room:
        """The memory that this worker may use, being one of so many on its machine."""
        from launch.memory_check import room_here

        return room_here(workers_here)

    def free_port(self, address: str) -> int:
        """A TCP port of this host that was free a moment ago."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            return int(probe.getsockname()[1])

    def run(self, job: StageJob, place: Place) -> StageResult:
        """One stage. The process group is joined with the first one and kept."""
        import torch.distributed

        from dino_scale.training import distributed

        self._asked = self._advanced = time.monotonic()
        self._step = None
        self._own.clear()
        ended = threading.Event()
        if self._lease:
            threading.Thread(target=self._watch_lease, args=(ended,), daemon=True).start()
        try:
            if not torch.distributed.is_initialized():
                distributed.join(
                    place.rank, place.world, place.local_rank, place.local_world, place.address, place.port
                )
            return run_stage(job, self)
        finally:
            ended.set()
            self._stop.clear()
            self._save.clear()

    def request_stop(self) -> None:
        self._stop.set()

    def request_save(self) -> None:
        """Save at the next step and go on; one rank is enough, the ranks agree."""
        self._save.set()

    def end(self) -> None:
        """End this process at once, for a driver that cannot ask the cluster for it; no answer comes."""
        os._exit(0)

    def pulse(self) -> Pulse:
        """How this worker fares, with the events since the last call."""
        self._asked = now = time.monotonic()
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        own = statistics.median(self._own) if len(self._own) >= _ENOUGH_STEPS else None
        notice = bool(self._notice_file) and Path(self._notice_file).exists()
        return Pulse(tuple(events), self._step, now - self._advanced, own, notice)

    def _watch_lease(self, ended: threading.Event) -> None:
        while not ended.wait(1.0):
            silence = time.monotonic() - self._asked
            if silence > self._lease:
                os.write(2, _ABANDONED.format(silence).encode())
                os._exit(1)

    # Control, for the worker function

    def report(self, event: Event) -> None:
        self._events.put(event)

    def beat(self, step: int, own_seconds: float | None = None) -> None:
        self._step, self._advanced = step, time.monotonic()
        if own_seconds is not None:
            self._own.append(own_seconds)

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def save_requested(self) -> bool:
        requested = self._save.is_set()
        self._save.clear()
        return requested
