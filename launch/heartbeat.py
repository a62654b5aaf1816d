"""What workers tell about themselves while they run, and what follows: who is slow, who is silent, who hangs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dino_scale.training.control import Event

_SLOW = 1.5  # a worker is slow when its own work takes this many times the median of those on other machines
_RECOVERED = 1.2  # and is so until it takes no longer than this many times
_NOTICEABLE_SECONDS = 0.1  # per step; a smaller lag is noise
_MUTE_SECONDS = 5.0  # a worker that takes longer to answer does not only wait for others
_SILENT_SECONDS = 15.0  # a worker that has answered nothing for this long is worth a line
_STALLED_SECONDS = 20.0  # without a step of anybody


@dataclass(frozen=True)
class Pulse:
    """One worker's answer to its driver.

    events: those not yet handed over (rank 0 only). step: optimizer steps done; None before the first one of this run.
    idle_seconds: since the last step, or since the stage began here. own_seconds: median over the last steps of the
    time that this worker spent without waiting for others; None until there are enough steps. notice: its machine is
    about to be taken away.
    """

    events: tuple[Event, ...]
    step: int | None
    idle_seconds: float
    own_seconds: float | None
    notice: bool


class Heartbeats:
    """The latest pulse of every rank.

    names: what to call each, such as "worker 3 on 10.0.0.7". machines: the address of each.
    """

    def __init__(self, names: Sequence[str], machines: Sequence[str], now: float) -> None:
        self.names, self._machines = tuple(names), tuple(machines)
        self._pulses: dict[int, Pulse] = {}
        self._heard = [now] * len(names)
        self._slow: set[str] = set()  # machines
        self._silent: set[int] = set()
        self._stalled = False

    def note(self, rank: int, pulse: Pulse, now: float) -> None:
        self._pulses[rank] = pulse
        self._heard[rank] = now

    def silence(self, rank: int, now: float) -> float:
        """Seconds since the rank answered."""
        return now - self._heard[rank]

    def idle(self, rank: int, now: float) -> float:
        """Seconds since the rank is known to have done a step, as far as the driver can tell."""
        pulse = self._pulses.get(rank)
        return self.silence(rank, now) + (pulse.idle_seconds if pulse else 0.0)

    def hung(self, patience: float, now: float) -> str | None:
        """In words, if a rank has been without a step for longer than `patience` seconds: the likeliest cause.

        One worker that hangs makes all of them wait, so one that does not even answer is named rather than another.
        """
        waiting = [rank for rank in range(len(self.names)) if self.idle(rank, now) > patience]
        if not waiting:
            return None
        mute = [rank for rank in range(len(self.names)) if self.silence(rank, now) > _MUTE_SECONDS]
        rank = max(mute or waiting, key=lambda rank: self.idle(rank, now))
        return f"{self.names[rank]} has done no step for {self.idle(rank, now):.0f} s ({self._last_step(rank)})"

    def remarks(self, now: float) -> list[str]:
        """New lines about slow and silent workers; each is said once until the worker has recovered."""
        return [*self._slow_remarks(), *self._silent_remarks(now), *self._stall_remarks(now)]

    def _slow_remarks(self) -> list[str]:
        """One line for a machine, about its slowest worker.

        Machines are compared with one another: workers that share one also share its cores, and whoever of them had to
        wait for the others tells nothing that anybody could mend.
        """
        own = {rank: pulse.own_seconds for rank, pulse in self._pulses.items() if pulse.own_seconds is not None}
        lines = []
        for machine in dict.fromkeys(self._machines):
            here = {rank: seconds for rank, seconds in own.items() if self._machines[rank] == machine}
            elsewhere = [seconds for rank, seconds in own.items() if rank not in here]
            if not here or not elsewhere:
                continue
            rank, usual = max(here, key=lambda rank: here[rank]), statistics.median(elsewhere)
            if here[rank] <= _RECOVERED * usual:
                self._slow.discard(machine)
            elif here[rank] >= max(_SLOW * usual, usual + _NOTICEABLE_SECONDS) and machine not in self._slow:
                self._slow.add(machine)
                lines.append(
                    f"{self.names[rank]} is slow: its own part of a step takes {here[rank]:.2f} s, that of workers on "
                    f"other machines {usual:.2f} s, and all wait for it; look at that machine"
                )
        return lines

    def _silent_remarks(self, now: float) -> list[str]:
        lines = []
        for rank, name in enumerate(self.names):
            seconds = self.silence(rank, now)
            if seconds < _SILENT_SECONDS:
                self._silent.discard(rank)
            elif rank not in self._silent:
                self._silent.add(rank)
                lines.append(f"{name} has not answered for {seconds:.0f} s ({self._last_step(rank)})")
        return lines

    def _stall_remarks(self, now: float) -> list[str]:
        """All workers answer, but none does a step: they wait for data, for one another, or for a compiler."""
        seconds = min(self.idle(rank, now) for rank in range(len(self.names)))
        if len(self._pulses) < len(self.names) or seconds < _STALLED_SECONDS:
            self._stalled = False
        elif not self._stalled:
            self._stalled = True
            return [f"no worker has done a step for {seconds:.0f} s ({self._last_step(0)})"]
        return []

    def _last_step(self, rank: int) -> str:
        pulse = self._pulses.get(rank)
        return "no step yet" if pulse is None or pulse.step is None else f"last step {pulse.step}"
