"""Signals as requests: Ctrl-C and SIGTERM save at the next step and end in good order, SIGUSR1 saves and goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SAME_EVENT_SECONDS = 1.0  # torchrun passes on a Ctrl-C that the terminal has already sent to every process


class StopRequest:
    """A context: the first SIGINT or SIGTERM only sets `requested`, a second SIGINT raises KeyboardInterrupt.

    SIGUSR1 asks for a checkpoint (`take_save_request`).
    """

    def __init__(self) -> None:
        self.requested = False
        self._save_requested = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install_again(self) -> None:
        """Take the signals back from a library that has replaced the handlers (Ray does)."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def take_save_request(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save_requested = True
            os.write(2, b"\nsaving: a checkpoint is written at the next step\n")
        elif not self.requested:
            self.requested = True
            self._first = time.monotonic()
            os.write(2, b"\nstopping: a checkpoint is written at the next step (Ctrl-C again: stop at once)\n")
        elif number == signal.SIGINT and time.monotonic() - self._first > _SAME_EVENT_SECONDS:
            raise KeyboardInterrupt


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C is ignored while something short is put in order."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
