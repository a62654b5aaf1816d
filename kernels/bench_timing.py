"""How long a call takes: the contenders of one comparison take turns, and the least time of each counts.

What else runs on the machine then hits all of them alike, and the ratios stay when the times move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

# One GPU call of a fraction of a millisecond is mostly the host's work. So calls are also queued behind a wait on the
# device, long enough for the host to get ahead, and timed by events on the device: as in a training step, whose queue
# is seldom empty. Fewer calls where one is so long that nothing is gained.
MOST_CALLS, SECONDS_OF_CALLS, CYCLES_AHEAD = 10, 0.1, 40_000_000


@dataclass(frozen=True)
class Times:
    """Seconds of one call. wall: from the call to the end of its work. queued: per call of several that are queued
    together, by the clock of the device; NaN on a CPU."""

    wall: float
    queued: float = math.nan


@dataclass(frozen=True)
class Row:
    """One contender of one comparison. times None: not measured; usual: the times of the usual way."""

    what: str
    dtype: str
    passes: str
    implementation: str
    times: Times | None = None
    usual: Times | None = None

    def ratio(self) -> float:
        """How many times faster than the usual way: on the clock of the device where there is one."""
        if self.times is None or self.usual is None:
            return math.nan
        if math.isnan(self.times.queued):
            return self.usual.wall / self.times.wall
        return self.usual.queued / self.times.queued


def rows(what: str, dtype: str, passes: str, taken: Mapping[str, Times]) -> Iterator[Row]:
    """The first contender is the usual way."""
    usual = next(iter(taken.values()))
    for name, times in taken.items():
        yield Row(what, dtype, passes, name, times, usual)


def failure(run: Callable[[], object]) -> str:
    """Why it cannot be measured, "" if it can: a peer built for something else shall not end the comparison."""
    try:
        run()
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def least_times(runs: Mapping[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, Times]:
    """The first turn, which compiles, is not counted."""
    on_gpu = device.type == "cuda"
    wall, queued = dict.fromkeys(runs, math.inf), dict.fromkeys(runs, math.inf if on_gpu else math.nan)
    for turn in range(turns + 1):
        for name, run in runs.items():
            taken = _wall(run, device)
            if turn:
                wall[name] = min(wall[name], taken)
            if turn and on_gpu:
                queued[name] = min(queued[name], _queued(run, device, wall[name]))
    return {name: Times(wall[name], queued[name]) for name in runs}


def _wall(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _queued(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    calls = max(1, min(MOST_CALLS, int(SECONDS_OF_CALLS / seconds)))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(CYCLES_AHEAD)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
