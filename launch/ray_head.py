"""The head of a Ray cluster: whether it can still be reached, and what to do about a call that waits for it.

Everything that Ray knows about a cluster is on its head. Without it a call to Ray waits for a minute, then Ray ends the
calling process without a word. Workers do not need the head for their steps, nor for answering their driver.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dino_scale.errors import ClusterLostError
from launch.network import accepts_connections

T = TypeVar("T")

_PROBE_SECONDS, _CONNECT_SECONDS = 1.0, 1.5
_LOST_SECONDS = 10.0  # Ray itself gives up after 60
_LOOK_SECONDS, _LEAVE_SECONDS = 0.1, 5.0


class Head:
    """Asks every second, in a thread of its own, whether anybody listens there.

    address: host:port. patience: seconds without one connection until it is lost.
    """

    def __init__(self, address: str, patience: float = _LOST_SECONDS) -> None:
        self.address, self._patience = address, patience
        self._closed, self._lost = threading.Event(), threading.Event()
        self._supervisor: threading.Thread | None = None
        threading.Thread(target=self._probe, name="head of the cluster", daemon=True).start()

    @property
    def lost(self) -> bool:
        """For good: its workers are told to end then."""
        return self._lost.is_set()

    def attend(self, function: Callable[[], T], meanwhile: Callable[[], None]) -> T:
        """What `function` returns or raises; ClusterLostError as soon as the head is lost, whatever is waited for then.

        It runs in a thread, because a call that waits for the head cannot be interrupted; that thread is left behind.
        meanwhile: called again and again in the calling thread, for the last time when `function` has ended.
        """
        outcome: list[tuple[bool, Any]] = []
        thread = threading.Thread(target=lambda: outcome.append(_outcome(function)), name="supervisor", daemon=True)
        self._supervisor = thread
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_SECONDS)
            meanwhile()
            if thread.is_alive() and self.lost:
                raise ClusterLostError(f"the head of the Ray cluster at {self.address} cannot be reached")
        meanwhile()
        succeeded, value = outcome[0]
        if not succeeded:
            raise value
        return value

    def close(self) -> None:
        """Ask no more, and let what `attend` has left to itself come to an end, unless it waits for a lost head."""
        self._closed.set()
        if self._supervisor is not None and not self.lost:
            self._supervisor.join(_LEAVE_SECONDS)

    def _probe(self) -> None:
        host, _, port = self.address.rpartition(":")
        failing_since = None
        while not self._closed.wait(_PROBE_SECONDS):
            began = time.monotonic()
            if accepts_connections(host.strip("[]"), int(port), _CONNECT_SECONDS):
                failing_since = None
            else:
                failing_since = failing_since or began
                if time.monotonic() - failing_since > self._patience:
                    self._lost.set()
                    return


def _outcome(function: Callable[[], T]) -> tuple[bool, T | BaseException]:
    """(True, what it returned) or (False, what it raised)."""
    try:
        return True, function()
    except BaseException as error:
        return False, error
