"""Work dealt to processes, results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dino_scale.errors import UserError, WorkerLostError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Runner(Protocol):
    """Who does the work: processes of this machine (below), or whoever else is handed in."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """function(task) for every task, in order; raises what `function` raises, WorkerLostError where a process died.

        function: of a module, not nested in another. Only a few tasks may be in flight, so that memory stays bounded.
        """


@dataclass(frozen=True)
class LocalProcesses:
    """A Runner of so many processes on this machine; 1: this process."""

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers is {self.workers}: expected 1 or more processes")

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        return ordered_map(function, tasks, self.workers)


def ordered_map(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """function(task) for every task, in order; at most 2 x workers tasks are in flight, so memory stays bounded.

    workers: processes; 1: in this process. Raises what `function` raises (the first by order of tasks), and
    WorkerLostError where a process died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")  # fork would copy the locks of other threads
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise WorkerLostError(
            "a packing process died (killed, or out of memory): run the same command again, it goes on where it "
            "stopped; fewer --workers need less memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the one that deals the work alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
