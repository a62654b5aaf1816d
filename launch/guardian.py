"""Ends what a killed driver leaves behind. Linux only; elsewhere it does nothing.

Ray's own servers end with the driver, but two of its helpers wait a minute for them first (a fixed time in Ray 2.60).
The guardian is a process that holds one end of a pipe: when the driver is gone, the pipe breaks, whatever the cause.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

_DISMISSED = "dismissed"


class Guardian:
    """Watches over the processes that this one has started, directly or not, until it is dismissed."""

    def __init__(self) -> None:
        wards = _descendants(os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to the driver's whole group must not reach it
        )
        self._write("".join(f"{pid} {born}\n" for pid, born in wards.items()))

    def dismiss(self) -> None:
        self._write(f"{_DISMISSED}\n")
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has ended the guardian; then there is none
            self._process.stdin.write(text)
            self._process.stdin.flush()


def _descendants(root: int) -> dict[int, int]:
    """Process id -> start time of all processes below `root`."""
    stats = _all_processes()
    found: dict[int, int] = {}
    parents = {root}
    while parents:
        children = {pid: born for pid, (parent, born) in stats.items() if parent in parents}
        found |= children
        parents = set(children)
    return found


def _all_processes() -> dict[int, tuple[int, int]]:
    """Process id -> (parent, start time in clock ticks since boot)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended
            fields = entry.read_text().rpartition(")")[2].split()  # the name before it may hold anything
            found[int(entry.parent.name)] = (int(fields[1]), int(fields[19]))
    return found


def _main() -> None:
    lines = sys.stdin.read().splitlines()
    if _DISMISSED in lines:
        return
    known = _all_processes()
    for line in lines:
        pid, born = map(int, line.split())
        if known.get(pid, (0, 0))[1] == born:  # otherwise the number belongs to another process by now
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _main()
