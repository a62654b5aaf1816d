"""How long a rank works on its own in a step: what tells a slow machine from one that waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnTime:
    """Seconds spent on reading data and on the forward pass since the last `take`.

    Backward is left out, because gradients are exchanged in it: there the fast ranks wait for the slow one. Under ZeRO
    stage 3 the forward pass exchanges parameters too, so differences between ranks look smaller than they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, seconds: float) -> None:
        self._seconds += seconds

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around work of this rank alone. On a GPU its own clock is read, later, so that nothing waits here."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            yield
            self.add(time.perf_counter() - begin)
            return
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        yield
        end_event.record()
        self._events.append((begin_event, end_event))

    def take(self) -> float:
        """The sum, which begins anew. To be called when the step's results were read, so nothing is waited for."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000.0
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
